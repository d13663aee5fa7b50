/* SPDX-License-Identifier: MIT */
/*
 * mis-init: pid 1 of an agent's container.
 *
 *   mis-init LIFELINE_FD -- CMD [ARG]...
 *   mis-init LIFELINE_FD CGROUP_FD INIT_PIDFD -- CMD [ARG]...
 *
 * It waits for requests of the supervisor on the lifeline, a SOCK_SEQPACKET socket: first the acts
 * that must be refused (so that each guard is seen to work from inside the agent's own cgroup,
 * network, mounts and seccomp filter), then "go".  From then on it is an ordinary init: it passes
 * signals on and reaps.  When the lifeline hangs up it kills everything in the pid namespace, and
 * exits when all are gone; if it is killed itself the kernel does that (pid_namespaces(7)).
 *
 * The agent runs with the same credentials.  What protects this process from it: not dumpable (no
 * ptrace, no /proc/1/mem: ptrace(2), PR_SET_DUMPABLE(2const)), and the kernel drops every signal to
 * pid 1 from inside its namespace that it has not asked for, SIGKILL and SIGSTOP included.
 *
 * The second form is the canary beside the init of an engine's container: among that one's mounts
 * and, from its first moment, in its cgroup.  Moving a process there later would wait for an RCU
 * grace period (cgroup_attach_lock), 25 ms.  It is a child of our caller and says "canary PID"; we
 * end at once, with 1 where the kernel cannot do that (Linux before 5.7).
 *
 * Requests (one datagram each, fields separated by one space) and answers:
 *   probe ACT ARGS...   probed ERRNO        0: the act succeeded
 *   hold + descriptors  held COUNT          keeps them open for as long as we live
 *   onloss open|closed  ok 0                whether the end of the lifeline ends us
 *   scope               ok 0                the agent will reach its own abstract sockets only
 *   go [+ descriptors]  started PID | failed ERRNO STEP
 *                                           three descriptors become the agent's 0, 1 and 2; else
 *                                           it has ours
 *   signal N            (none)              to the agent's process group
 * and unasked: stopped SIGNO (job control), and at the end: exit CODE | killed SIGNO.
 *
 * Exit code: the agent's, 128 + SIGNO, 127 or 126 when it could not be executed, 137 when the
 * lifeline ended, 125 when we were started wrongly.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MESSAGE 4096
#define MOST_ARGS 10
#define MOST_FDS 32
#define OOM_SCORE "500" /* of the agent: under memory pressure it goes first, and we go last */

static int lifeline;
static pid_t agent;
static int open_on_loss, scoped;
static char **command;

static const int forwarded[] = { SIGHUP,  SIGINT,   SIGQUIT, SIGTERM, SIGUSR1,
				 SIGUSR2, SIGWINCH, SIGCONT, 0 };

static void answer(const char *word, int value, const char *more)
{
	char text[64];
	int length = snprintf(text, sizeof(text), "%s %d%s", word, value, more);

	/* A supervisor that is gone is noticed by poll, not here. */
	(void)!send(lifeline, text, length, MSG_NOSIGNAL);
}

static int address(char **args, struct sockaddr_storage *out, socklen_t *length)
{
	struct sockaddr_in *in4 = (void *)out;
	struct sockaddr_in6 *in6 = (void *)out;

	memset(out, 0, sizeof(*out));
	out->ss_family = atoi(args[0]);
	if (out->ss_family == AF_INET) {
		*length = sizeof(*in4);
		in4->sin_port = htons(atoi(args[3]));
		return inet_pton(AF_INET, args[2], &in4->sin_addr) == 1;
	}
	*length = sizeof(*in6);
	in6->sin6_port = htons(atoi(args[3]));
	return inet_pton(AF_INET6, args[2], &in6->sin6_addr) == 1;
}

/* connect, send, bind: FAMILY TYPE ADDRESS PORT. Returns 0 or an errno. */
static int network_act(const char *act, char **args)
{
	struct sockaddr_storage to;
	socklen_t length;
	int fd, result;

	if (!address(args, &to, &length))
		return EINVAL;
	fd = socket(to.ss_family, atoi(args[1]) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	if (!strcmp(act, "connect"))
		result = connect(fd, (void *)&to, length);
	else if (!strcmp(act, "bind"))
		result = bind(fd, (void *)&to, length);
	else
		result = sendto(fd, "mis", 3, MSG_NOSIGNAL, (void *)&to, length) < 0 ? -1 : 0;
	result = result < 0 && errno != EINPROGRESS ? errno : 0;
	close(fd);
	return result;
}

static void finish(int code);

/*
 * The errno that a child wrote into its pipe; ``silent`` when it closed it without a word.
 *
 * An open or exec waits for a verdict of the supervisor, and would wait for ever where we hold the
 * last copy of the descriptor that answers: so it is never us who opens, and our wait ends with the
 * lifeline.
 */
static int told_by_child(int report[2], int silent)
{
	struct pollfd watched[2] = { { .fd = report[0], .events = POLLIN }, { .fd = lifeline } };
	int error = silent;

	close(report[1]);
	do {
		if (poll(watched, 2, -1) < 0)
			continue;
		if (watched[1].revents & (POLLHUP | POLLERR)) {
			if (!open_on_loss)
				finish(137);
			watched[1].fd = -1;
		}
	} while (!watched[0].revents);
	if (read(report[0], &error, sizeof(error)) <= 0)
		error = silent;
	close(report[0]);
	return error;
}

/*
 * From now on this process and its children connect to no abstract socket that others have bound
 * (landlock(7), Linux 6.12).  As in linux/landlock.h, which on older systems lacks the last field.
 */
static int scope(void)
{
	struct {
		unsigned long long files, ports, scoped;
	} wanted = { .scoped = 1 /* LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET */ };
	int fd = syscall(SYS_landlock_create_ruleset, &wanted, sizeof(wanted), 0), error;

	if (fd < 0)
		return errno;
	error = syscall(SYS_landlock_restrict_self, fd, 0) ? errno : 0;
	close(fd);
	return error;
}

/* Connect to an abstract socket, as the agent will be able to. Returns 0 or an errno. */
static int connect_abstract(const char *name)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	size_t length = strlen(name);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), error = scoped ? scope() : 0;

	if (fd < 0 || length >= sizeof(to.sun_path))
		return EINVAL;
	memcpy(to.sun_path + 1, name, length);
	length += offsetof(struct sockaddr_un, sun_path) + 1;
	return error ?: connect(fd, (void *)&to, length) ? errno : 0;
}

enum act { OPEN, EXEC, ABSTRACT };

/* One act on a path or name, in a child that is killed if it executed it. Returns 0 or an errno. */
static int act_in_child(enum act act, int flags, char *path)
{
	int report[2], error;
	pid_t child;

	if (pipe2(report, O_CLOEXEC))
		return errno;
	child = fork();
	if (child == 0) {
		char *argv[] = { path, NULL }, *envp[] = { NULL };

		if (act == EXEC)
			execve(path, argv, envp);
		if (act == ABSTRACT)
			error = connect_abstract(path);
		else
			error = act == EXEC || open(path, flags | O_CLOEXEC | O_NONBLOCK, 0600) < 0 ? errno : 0;
		(void)!write(report[1], &error, sizeof(error));
		_exit(0);
	}
	error = child < 0 ? errno : 0;
	/* A child that says nothing has executed, or was killed before it opened. */
	error = error ?: told_by_child(report, act == EXEC ? 0 : ECANCELED);
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	} else {
		close(report[0]);
		close(report[1]);
	}
	return error;
}

static int probe(const char *act, char **args, int count)
{
	long values[6] = { 0 };
	int fd;

	if (!strcmp(act, "connect") || !strcmp(act, "send") || !strcmp(act, "bind"))
		return count == 4 ? network_act(act, args) : EINVAL;
	if (!strcmp(act, "socket") && count == 3) {
		fd = socket(atoi(args[0]), atoi(args[1]) | SOCK_CLOEXEC, atoi(args[2]));
		if (fd < 0)
			return errno;
		close(fd);
		return 0;
	}
	if (!strcmp(act, "open") && count == 2)
		return act_in_child(OPEN, strtol(args[0], NULL, 0), args[1]);
	if (!strcmp(act, "exec") && count == 1)
		return act_in_child(EXEC, 0, args[0]);
	if (!strcmp(act, "abstract") && count == 1)
		return act_in_child(ABSTRACT, 0, args[0]);
	if (!strcmp(act, "syscall") && count >= 1 && count <= 7) {
		for (int n = 1; n < count; n++)
			values[n - 1] = strtol(args[n], NULL, 0);
		return syscall(strtol(args[0], NULL, 0), values[0], values[1], values[2], values[3],
			       values[4], values[5]) < 0 ? errno : 0;
	}
	return ENOTSUP;
}

/* In the agent's process: everything that was ours is given back, then it is executed. */
static int become(const int *fds, int count)
{
	sigset_t none;
	int fd;

	close(lifeline);
	for (int n = 0; n < count; n++)
		if (dup2(fds[n], n) < 0)
			return errno;
	/* A group of its own, in the foreground of the terminal if that is ours. SIGTTOU is blocked. */
	setpgid(0, 0);
	if (isatty(STDIN_FILENO))
		tcsetpgrp(STDIN_FILENO, getpid());
	/*
	 * Raising one's own score needs no privilege, but /proc/self is root's while not dumpable.
	 * It fails where the score is higher already, which is as good.
	 */
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!write(fd, OOM_SCORE, strlen(OOM_SCORE));
		close(fd);
	}
	if (scoped && (fd = scope()))
		return fd;
	for (int n = 1; n < NSIG; n++)
		signal(n, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execvp(command[0], command);
	return errno;
}

/* Fork and execute the agent, with these descriptors if there are three; 0 or an errno. */
static int go(const int *fds, int count)
{
	int report[2], error;

	if (count != 0 && count != 3)
		return EINVAL;
	if (pipe2(report, O_CLOEXEC))
		return errno;
	agent = fork();
	if (agent == 0) {
		error = become(fds, count);
		(void)!write(report[1], &error, sizeof(error));
		_exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
	}
	if (agent > 0)
		return told_by_child(report, 0);
	error = errno;
	close(report[0]);
	close(report[1]);
	return error;
}

/* Split at single spaces; the path that ends an open or exec act keeps its own. */
static int split(char *text, char **args)
{
	int count = 0, most = MOST_ARGS;

	while (count < most && text) {
		if (count == most - 1) {
			args[count++] = text;
			break;
		}
		args[count++] = strsep(&text, " ");
		if (count == 2 && !strcmp(args[0], "probe"))
			most = !strcmp(args[1], "open") ? 4 : !strcmp(args[1], "exec") ? 3 : most;
	}
	return count;
}

static void request(void)
{
	char text[MESSAGE + 1], control[CMSG_SPACE(MOST_FDS * sizeof(int))], *args[MOST_ARGS];
	struct iovec part = { text, MESSAGE };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	ssize_t length = recvmsg(lifeline, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	struct cmsghdr *header = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	int fds[MOST_FDS], many = 0, keep = 0, count, error;

	if (length <= 0)
		return;
	if (header && header->cmsg_type == SCM_RIGHTS) {
		many = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(header), many * sizeof(int));
	}
	text[length] = 0;
	count = split(text, args);
	if (!strcmp(args[0], "probe") && count >= 2) {
		answer("probed", probe(args[1], args + 2, count - 2), "");
	} else if (!strcmp(args[0], "hold")) {
		keep = 1;
		answer("held", many, "");
	} else if (!strcmp(args[0], "onloss") && count == 2) {
		open_on_loss = !strcmp(args[1], "open");
		answer("ok", 0, "");
	} else if (!strcmp(args[0], "scope")) {
		scoped = 1;
		answer("ok", 0, "");
	} else if (!strcmp(args[0], "go") && !agent) {
		error = go(fds, many);
		answer(error ? "failed" : "started", error ?: agent, error ? " exec" : "");
	} else if (!strcmp(args[0], "signal") && count == 2 && agent > 0) {
		/* The whole group, as a terminal would; the agent may have left it by setsid. */
		if (kill(-agent, atoi(args[1])))
			kill(agent, atoi(args[1]));
	}
	while (!keep && many > 0)
		close(fds[--many]);
}

/*
 * End, and everything in the pid namespace before us.
 *
 * We may hold the last copy of a descriptor that answers for the agent ("hold"); it is closed when
 * we exit, which the kernel does before it kills the namespace (do_exit: exit_files, then
 * zap_pid_ns_processes), and what waits for an answer would pass.  So everybody else is gone first.
 * kill(-1) reaches all of them at once: a fork with a signal pending fails (copy_process).
 */
static void finish(int code)
{
	kill(-1, SIGKILL);
	while (waitpid(-1, NULL, __WALL) > 0 || errno == EINTR)
		;
	_exit(code);
}

/* Reap whatever ended; when it was the agent, report and end with its code. */
static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0) {
		if (pid != agent)
			continue;
		if (WIFSTOPPED(status)) {
			answer("stopped", WSTOPSIG(status), "");
			continue;
		}
		if (WIFEXITED(status)) {
			answer("exit", WEXITSTATUS(status), "");
			finish(WEXITSTATUS(status));
		}
		answer("killed", WTERMSIG(status), "");
		finish(128 + WTERMSIG(status));
	}
}

/* A signal to us: of the kernel (a child, the terminal), of the host, or of the agent itself. */
static void received(int number)
{
	if (number == SIGCHLD)
		reap();
	for (int n = 0; forwarded[n] && agent > 0; n++)
		if (forwarded[n] == number)
			kill(-agent, number);
}

/* Go on as our caller's child in that cgroup, among the mounts of that process; see above. */
static void be_canary(int cgroup, int init)
{
	struct clone_args how = { .flags = CLONE_INTO_CGROUP | CLONE_PARENT, .cgroup = cgroup };
	long pid;

	if (setns(init, CLONE_NEWNS))
		_exit(1);
	pid = syscall(SYS_clone3, &how, sizeof(how));
	if (pid < 0)
		_exit(1);
	if (pid > 0) {
		answer("canary", pid, "");
		_exit(0);
	}
	close(cgroup);
	close(init);
}

int main(int argc, char **argv)
{
	struct signalfd_siginfo info;
	struct pollfd watched[2];
	sigset_t all;

	/* First of all: the agent must never be able to look into us. */
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || argc < 4)
		return 125;
	lifeline = atoi(argv[1]);
	if (argc > 5 && !strcmp(argv[4], "--")) {
		be_canary(atoi(argv[2]), atoi(argv[3]));
		argv += 2;
	}
	if (strcmp(argv[2], "--"))
		return 125;
	command = argv + 3;
	if (fcntl(lifeline, F_SETFD, FD_CLOEXEC))
		return 125;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	watched[0] = (struct pollfd){ .fd = lifeline, .events = POLLIN };
	watched[1] = (struct pollfd){ .fd = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK),
				      .events = POLLIN };
	if (watched[1].fd < 0)
		return 125;
	for (;;) {
		if (poll(watched, 2, -1) < 0 && errno != EINTR)
			return 125;
		if (watched[0].revents & POLLIN)
			request();
		if (watched[0].revents & (POLLHUP | POLLERR)) {
			if (!open_on_loss)
				finish(137);
			watched[0].fd = -1;
		}
		while (read(watched[1].fd, &info, sizeof(info)) == sizeof(info))
			received(info.ssi_signo);
	}
}
