/* SPDX-License-Identifier: MIT */
/*
 * mis-init: pid 1 of an agent's container.
 *
 *   mis-init LIFELINE_FD -- CMD [ARG]...
 *
 * It waits for requests of the supervisor on the lifeline, a SOCK_SEQPACKET socket: first the acts
 * that must be refused (so that each guard is seen to work from inside the agent's own cgroup,
 * network, mounts and seccomp filter), then "go".  From then on it is an ordinary init: it passes
 * signals on and reaps.  When the lifeline hangs up it exits, and the kernel kills everything else
 * in the pid namespace (pid_namespaces(7)).
 *
 * The agent runs with the same credentials.  What protects this process from it: not dumpable (no
 * ptrace, no /proc/1/mem: ptrace(2), PR_SET_DUMPABLE(2const)), and pid 1 gets no signal from inside
 * its namespace that it has no handler for, SIGKILL included.
 *
 * Requests (one datagram each) and answers:
 *   probe ACT ARGS...   probed ERRNO        0: the act succeeded
 *   hold + SCM_RIGHTS   held                keeps descriptors open for as long as we live
 *   onloss open|closed  ok                  whether the end of the lifeline ends us
 *   go                  started | failed ERRNO
 *   signal N            (none)
 * and at the end of the agent, unasked: exit CODE | killed SIGNO.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MESSAGE 4096
#define MOST_ARGS 8

static int lifeline;
static pid_t agent;
static int open_on_loss;
static char **command;

static void answer(const char *word, int value)
{
	char text[64];
	int length = snprintf(text, sizeof(text), "%s %d", word, value);

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

/* exec PATH in a child; 0 when it was executed at all, whatever it did then. */
static int exec_act(char *path)
{
	int report[2], error = 0;
	pid_t child;

	if (pipe2(report, O_CLOEXEC))
		return errno;
	child = fork();
	if (child == 0) {
		char *argv[] = { path, NULL }, *envp[] = { NULL };

		execve(path, argv, envp);
		error = errno;
		(void)!write(report[1], &error, sizeof(error));
		_exit(0);
	}
	close(report[1]);
	if (child < 0)
		error = errno;
	else if (read(report[0], &error, sizeof(error)) <= 0)
		error = 0;
	close(report[0]);
	if (child > 0)
		waitpid(child, NULL, 0);
	return error;
}

static int probe(const char *act, char **args, int count)
{
	long values[6] = { 0 };
	int fd;

	if (!strcmp(act, "connect") || !strcmp(act, "send") || !strcmp(act, "bind"))
		return count == 4 ? network_act(act, args) : EINVAL;
	if (!strcmp(act, "socket") && count == 3) {
		fd = socket(atoi(args[0]), atoi(args[1]), atoi(args[2]));
		if (fd < 0)
			return errno;
		close(fd);
		return 0;
	}
	if (!strcmp(act, "open") && count == 2) {
		fd = open(args[1], atoi(args[0]) | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			return errno;
		close(fd);
		return 0;
	}
	if (!strcmp(act, "exec") && count == 1)
		return exec_act(args[0]);
	if (!strcmp(act, "syscall") && count >= 1) {
		for (int n = 1; n < count && n <= 6; n++)
			values[n - 1] = strtol(args[n], NULL, 0);
		return syscall(strtol(args[0], NULL, 0), values[0], values[1], values[2], values[3],
			       values[4], values[5]) < 0 ? errno : 0;
	}
	return ENOTSUP;
}

/* Fork and execute the agent; returns 0 or the errno of what failed. */
static int go(void)
{
	int report[2], error = 0;
	sigset_t none;

	if (pipe2(report, O_CLOEXEC))
		return errno;
	agent = fork();
	if (agent < 0)
		return errno;
	if (agent == 0) {
		/* A group of its own, in the foreground of the terminal if there is one. */
		setpgid(0, 0);
		if (isatty(STDIN_FILENO))
			tcsetpgrp(STDIN_FILENO, getpid());
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		for (int n = 1; n < NSIG; n++)
			signal(n, SIG_DFL);
		execvp(command[0], command);
		error = errno;
		(void)!write(report[1], &error, sizeof(error));
		_exit(error == ENOENT ? 127 : 126);
	}
	close(report[1]);
	if (read(report[0], &error, sizeof(error)) <= 0)
		error = 0;
	close(report[0]);
	return error;
}

static void request(void)
{
	char text[MESSAGE + 1], control[CMSG_SPACE(16 * sizeof(int))], *args[MOST_ARGS], *rest = text;
	struct iovec part = { text, MESSAGE };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	ssize_t length = recvmsg(lifeline, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	int count = 0, error;

	if (length <= 0)
		return;
	text[length] = 0;
	/* The last field may contain spaces only where a path is one: it is then the last of its act. */
	while (count < MOST_ARGS && (args[count] = strsep(&rest, " "))) {
		count++;
		if (count == 3 && !strcmp(args[0], "probe") && !strcmp(args[1], "open") && rest) {
			args[count++] = rest;
			break;
		}
		if (count == 2 && !strcmp(args[0], "probe") && !strcmp(args[1], "exec") && rest) {
			args[count++] = rest;
			break;
		}
	}
	if (!strcmp(args[0], "probe") && count >= 2) {
		answer("probed", probe(args[1], args + 2, count - 2));
	} else if (!strcmp(args[0], "hold")) {
		answer("held", 0); /* received descriptors simply stay open */
	} else if (!strcmp(args[0], "onloss") && count == 2) {
		open_on_loss = !strcmp(args[1], "open");
		answer("ok", 0);
	} else if (!strcmp(args[0], "go") && !agent) {
		error = go();
		answer(error ? "failed" : "started", error);
	} else if (!strcmp(args[0], "signal") && count == 2 && agent > 0) {
		/* The whole foreground group, as a terminal would. */
		kill(-agent, atoi(args[1]));
	}
}

/* Reap whatever ended; when it was the agent, report and end with its code. */
static void reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid != agent)
			continue;
		if (WIFEXITED(status)) {
			answer("exit", WEXITSTATUS(status));
			_exit(WEXITSTATUS(status));
		}
		answer("killed", WTERMSIG(status));
		_exit(128 + WTERMSIG(status));
	}
}

int main(int argc, char **argv)
{
	struct signalfd_siginfo info;
	struct pollfd watched[2];
	sigset_t all;

	/* First of all: the agent must never be able to look into us. */
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) || argc < 4 || strcmp(argv[2], "--"))
		return 125;
	lifeline = atoi(argv[1]);
	command = argv + 3;
	if (fcntl(lifeline, F_SETFD, FD_CLOEXEC))
		return 125;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	watched[0] = (struct pollfd){ .fd = lifeline, .events = POLLIN };
	watched[1] = (struct pollfd){ .fd = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK),
				      .events = POLLIN };
	for (;;) {
		if (poll(watched, 2, -1) < 0 && errno != EINTR)
			return 125;
		if (watched[0].revents & POLLIN)
			request();
		else if (watched[0].revents & (POLLHUP | POLLERR)) {
			if (!open_on_loss)
				_exit(137);
			watched[0].fd = -1;
		}
		while (read(watched[1].fd, &info, sizeof(info)) == sizeof(info)) {
			if (info.ssi_signo == SIGCHLD)
				reap();
			else if (agent > 0)
				kill(-agent, info.ssi_signo);
		}
	}
}
