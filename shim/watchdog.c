/* SPDX-License-Identifier: MIT */
/*
 * mis-watchdog: ends the agent when its supervisor no longer can, or keeps it going.
 *
 *   mis-watchdog RUN CGROUP DEADLINE_MS BEAT_MS closed|open -- GC-COMMAND [ARG]...
 *
 * A process of its own, tiny and static, that shares nothing with the supervisor that could fail
 * with it.  It holds a copy of the shim's lifeline, so the agent outlives the supervisor exactly as
 * long as the watchdog says; when both are gone the shim sees the end of the line and takes the
 * whole pid namespace with it.
 *
 * Descriptors: 1 says "watching" once and is closed; 3 beats; 4 pidfd of the supervisor; 5 the
 * run's record; 6 and 7 cgroup.procs of the cgroup to be in and of the one to clean up from (or
 * /dev/null).  Beats are datagrams: "beat"; "hold NAME" with a descriptor; "hold" with some that have
 * no name, and stay open until the end; "pause" (the supervisor is stopped on purpose); "resume";
 * "frozen" (the agent, by the supervisor); "thawed"; "drop NAME"; "bye" (normal end).  Answers:
 * "late", "recovered".
 *
 * Until the first "beat" the launch is being set up, which takes as long as it takes: only the end
 * of the beats counts.  Lost means: no word for DEADLINE_MS, or the end of the beats without "bye".
 *
 * closed: kill, see the cgroup empty, kill the supervisor if it only hangs, and become
 * GC-COMMAND.  What is held is closed last: opens that wait for a verdict wait until the end.
 *
 * open: the agent goes on without verdicts.  Opens are let through and counted ("fanotify"), calls
 * of the escape guard too ("seccomp…", one per filter); the kernel plane, which misses its own beats,
 * audits; the network's rules are the kernel's and stay in force.  The run's lock ("lock") keeps it
 * from being cleaned up.  Whoever of root connects to the socket "attach" gets everything that is
 * held under a name, becomes the supervisor, and its connection the beats.
 * When the agent's init ("init", a pidfd) ends, GC-COMMAND removes what is left.
 * Out of scope: judging violations, cleaning up.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BEATS = 3, SUPERVISOR = 4, RECORD = 5, ENTER = 6, LEAVE = 7 };
#define GOOD_BEATS 5 /* in a row, to recover from a late one */
#define EMPTY_WITHIN 5000 /* ms the killed cgroup gets to become empty */
#define MOST_HELD 32
#define MOST_TAKEN 65536 /* descriptors; fewer than this have tasks that wait for the supervisor */
#define MOST_SENT 253 /* descriptors in a datagram, SCM_MAX_FD */
#define NAME 24

static const char *run, *cgroup;
static int frozen; /* the agent, by the supervisor */
static struct held {
	char name[NAME];
	int fd;
} held[MOST_HELD];
static int held_count;

/* The descriptor held under a name, -1 without one, which poll(2) skips. */
static int held_as(const char *name)
{
	for (int n = 0; n < held_count; n++)
		if (!strcmp(held[n].name, name))
			return held[n].fd;
	return -1;
}

static void drop(const char *name)
{
	for (int n = 0; n < held_count; n++) {
		if (strcmp(held[n].name, name))
			continue;
		close(held[n].fd);
		held[n] = held[--held_count];
		return;
	}
}

static long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Append one line to the record, in the schema of events.py. */
static void say(const char *kind, const char *why, long milliseconds)
{
	char line[512];
	struct timespec now;
	int length;

	clock_gettime(CLOCK_REALTIME, &now);
	length = snprintf(line, sizeof(line),
			  "{\"run\": \"%s\", \"v\": 1, \"time\": %ld.%06ld, \"kind\": \"watchdog.%s\", "
			  "\"guard\": \"liveness\", \"subject\": {\"why\": \"%s\", "
			  "\"milliseconds\": %ld}}\n",
			  run, (long)now.tv_sec, now.tv_nsec / 1000, kind, why, milliseconds);
	(void)!write(RECORD, line, length);
}

static int cgroup_write(const char *name, const char *text)
{
	char path[PATH_MAX];
	int fd, done;

	snprintf(path, sizeof(path), "%s/%s", cgroup, name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	done = write(fd, text, strlen(text)) > 0;
	close(fd);
	return done;
}

static int populated(void)
{
	char path[PATH_MAX], text[256];
	ssize_t length;
	int fd;

	snprintf(path, sizeof(path), "%s/cgroup.events", cgroup);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0; /* removed: nobody can be in it */
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (length <= 0)
		return 0;
	text[length] = 0;
	return strstr(text, "populated 1") != NULL;
}

/* SIGKILL every process listed in a cgroup directory and the ones below it. */
static void kill_listed(const char *folder)
{
	char path[PATH_MAX];
	struct dirent *entry;
	FILE *list;
	DIR *dir;
	int pid;

	snprintf(path, sizeof(path), "%s/cgroup.procs", folder);
	list = fopen(path, "re");
	if (list) {
		while (fscanf(list, "%d", &pid) == 1)
			if (pid > 0)
				kill(pid, SIGKILL);
		fclose(list);
	}
	dir = opendir(folder);
	if (!dir)
		return;
	while ((entry = readdir(dir))) {
		if (entry->d_type != DT_DIR || entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
		kill_listed(path);
	}
	closedir(dir);
}

/*
 * Kill, prove empty; the milliseconds it took, -1 if it is not empty.
 *
 * Not frozen before: were we killed between the two, the init could not end what is left.
 */
static long end_agent(void)
{
	struct timespec pause = { .tv_nsec = 1000000 };
	long began = now_ms();
	int killed = cgroup_write("cgroup.kill", "1");

	while (populated() && now_ms() - began < EMPTY_WITHIN) {
		if (!killed) { /* a kernel before 5.14: frozen, so nobody forks away */
			cgroup_write("cgroup.freeze", "1");
			kill_listed(cgroup);
			cgroup_write("cgroup.freeze", "0");
		}
		nanosleep(&pause, NULL);
	}
	return populated() ? -1 : now_ms() - began;
}

static void end_supervisor(void)
{
	struct pollfd supervisor = { .fd = SUPERVISOR, .events = POLLIN };

	/* If it is dead already, which is why we are here, this fails and nothing is lost. */
	syscall(SYS_pidfd_send_signal, SUPERVISOR, SIGKILL, NULL, 0);
	poll(&supervisor, 1, 2000);
}

static void clean_up(char **gc)
{
	struct sched_param ordinary = { 0 };

	while (held_count > 0)
		close(held[--held_count].fd); /* the shim goes too if a kill could not reach it */
	sched_setscheduler(0, SCHED_OTHER, &ordinary); /* cleaning up is not urgent */
	(void)!write(LEAVE, "0", 1); /* what we were in is to be removed */
	close(LEAVE);
	execv(gc[0], gc);
	_exit(127);
}

static void close_run(const char *why, char **gc)
{
	say("closed", why, end_agent());
	cgroup_write("cgroup.freeze", "0"); /* an engine may use its container's cgroup again */
	end_supervisor();
	clean_up(gc);
}

/* Let through whatever opens wait; how many. */
static int let_opens_pass(int group)
{
	char buffer[4096] __attribute__((aligned(8)));
	struct fanotify_event_metadata *event = (void *)buffer;
	ssize_t length = read(group, buffer, sizeof(buffer));
	int count = 0;

	for (; length > 0 && FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
		struct fanotify_response answer = { .fd = event->fd, .response = FAN_ALLOW };

		if (event->fd < 0)
			continue;
		close(event->fd); /* only its number is the answer's */
		(void)!write(group, &answer, sizeof(answer));
		count++;
	}
	return count;
}

/* Let one call of the escape guard through; how many. */
static int let_call_pass(int listener)
{
	char call[1024] __attribute__((aligned(8))) = { 0 };
	struct seccomp_notif *found = (void *)call;
	struct seccomp_notif_resp answer = { .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };

	if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, found))
		return 0;
	answer.id = found->id;
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
	return 1;
}

/*
 * Let go on whoever waits for an answer that the supervisor, which is dead, had yet to give.
 *
 * An open is let through by the number of its descriptor, which was the supervisor's: the kernel looks
 * for nothing else and refuses a number that no open waits with (process_access_response in
 * fanotify_user.c).  A call is restarted, and asked about again, after a signal (seccomp_unotify(2));
 * freezing interrupts it as one, and no process sees it.
 */
static void release_waiting(int group)
{
	struct fanotify_response answer = { .response = FAN_ALLOW };
	char path[PATH_MAX], others = '0';
	int fd;

	for (answer.fd = 0; group >= 0 && answer.fd < MOST_TAKEN; answer.fd++)
		(void)!write(group, &answer, sizeof(answer));
	snprintf(path, sizeof(path), "%s/cgroup.freeze", cgroup);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	(void)!read(fd, &others, 1);
	close(fd);
	if (others == '1' && !frozen) /* an engine's pause: they are asked about when that ends */
		return;
	cgroup_write("cgroup.freeze", "1");
	cgroup_write("cgroup.freeze", "0");
	frozen = 0;
}

/* Give one descriptor away under its name. */
static int give(int peer, const struct held *one)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { (void *)one->name, strlen(one->name) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &one->fd, sizeof(int));
	return sendmsg(peer, &message, MSG_NOSIGNAL) > 0;
}

/* Whether a process of root connected and has everything now: it is the supervisor. */
static int hand_over(int listener)
{
	int peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC), pidfd, complete = 1;
	struct ucred who = { .uid = -1 };
	socklen_t size = sizeof(who);

	if (peer < 0)
		return 0;
	getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &who, &size);
	pidfd = who.uid == 0 ? (int)syscall(SYS_pidfd_open, who.pid, 0) : -1;
	for (int n = 0; n < held_count && pidfd >= 0 && complete; n++)
		complete = give(peer, &held[n]);
	if (pidfd < 0 || !complete || send(peer, "end", 3, MSG_NOSIGNAL) != 3) {
		close(peer);
		return 0;
	}
	dup2(peer, BEATS);
	dup2(pidfd, SUPERVISOR);
	close(peer);
	close(pidfd);
	return 1;
}

/* Nobody judges: let everything pass until a supervisor attaches, or the agent ends. */
static void keep_open(const char *why, char **gc)
{
	struct sched_param ordinary = { 0 }, first = { .sched_priority = 1 };
	struct pollfd watched[3 + MOST_HELD] = {
		{ .fd = held_as("init"), .events = POLLIN },
		{ .fd = held_as("fanotify"), .events = POLLIN },
		{ .fd = held_as("attach"), .events = POLLIN },
	};
	int count = 3, opens = 0, calls = 0;
	long began = now_ms();
	char words[64];

	for (int n = 0; n < held_count; n++)
		if (!strncmp(held[n].name, "seccomp", 7))
			watched[count++] = (struct pollfd){ .fd = held[n].fd, .events = POLLIN };
	end_supervisor();
	release_waiting(watched[1].fd);
	say("open", why, 0);
	dprintf(STDERR_FILENO, "mis-watchdog: %s: %s; it goes on UNGUARDED until: mis attach %s\n", run,
		why, run);
	sched_setscheduler(0, SCHED_OTHER, &ordinary); /* an agent's storm must not take the CPU */
	for (;;) {
		if (poll(watched, count, -1) < 0)
			continue;
		if (watched[0].revents)
			break;
		if (watched[1].revents & POLLIN)
			opens += let_opens_pass(watched[1].fd);
		for (int n = 3; n < count; n++) {
			if (watched[n].revents & POLLIN)
				calls += let_call_pass(watched[n].fd);
			else if (watched[n].revents)
				watched[n].fd = -1; /* nobody uses the filter any more */
		}
		if (watched[2].revents && hand_over(watched[2].fd))
			break;
	}
	snprintf(words, sizeof(words), "%d opens, %d calls passed unjudged", opens, calls);
	say(watched[0].revents ? "ended" : "attached", words, now_ms() - began);
	if (watched[0].revents)
		clean_up(gc);
	sched_setscheduler(0, SCHED_RR, &first);
}

/* Read one word; keeps descriptors that came along. Empty at the end of the beats. */
static ssize_t hear(char *text, size_t size)
{
	char control[CMSG_SPACE(MOST_SENT * sizeof(int))];
	struct iovec part = { text, size - 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	ssize_t length = recvmsg(BEATS, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	struct cmsghdr *header;

	if (length < 0)
		return errno == EAGAIN || errno == EINTR ? -1 : 0;
	text[length] = 0;
	if (message.msg_flags & MSG_CTRUNC) { /* no descriptor is free: the supervisor ends the agent */
		say("full", "what must stay open could not be held", 0);
		_exit(125);
	}
	header = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (header && header->cmsg_type == SCM_RIGHTS && strcmp(text, "hold")) {
		int *fds = (int *)CMSG_DATA(header);
		int count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		for (int n = 0; n < count; n++) {
			if (held_count == MOST_HELD || strncmp(text, "hold ", 5)) {
				close(fds[n]);
				continue;
			}
			snprintf(held[held_count].name, NAME, "%s", text + 5);
			held[held_count++].fd = fds[n];
		}
	}
	return length;
}

/* Until "bye" (0), or until the supervisor is lost (why). */
static const char *watch(long deadline, long beat)
{
	struct pollfd beats = { .fd = BEATS, .events = POLLIN };
	long last = now_ms(), asked, now, wait;
	int paused = 1, late = 0, good = 0;
	char word[64];
	ssize_t length;

	for (;;) {
		asked = now_ms();
		wait = last + deadline - asked;
		if (wait < 0)
			wait = 0;
		length = poll(&beats, 1, paused ? -1 : (int)wait);
		now = now_ms();
		if (length == 0) {
			/* Were we the ones without CPU? Then silence proves nothing: ask once more. */
			if (now - asked > wait + deadline / 2) {
				say("starved", "the watchdog got no CPU", now - asked - wait);
				last = now;
				continue;
			}
			return "no beat within the deadline";
		}
		length = hear(word, sizeof(word));
		if (length < 0)
			continue;
		if (length == 0)
			return "the supervisor died";
		if (!strcmp(word, "bye"))
			return NULL;
		if (!strncmp(word, "drop ", 5))
			drop(word + 5);
		else if (!strcmp(word, "frozen") || !strcmp(word, "thawed"))
			frozen = *word == 'f';
		else if (strncmp(word, "hold", 4))
			paused = !strcmp(word, "pause");
		if (!late && !strcmp(word, "beat") && now - last > 2 * beat + deadline / 4) {
			late = 1;
			good = 0;
			say("late", "a beat came late", now - last);
			(void)!send(BEATS, "late", 4, MSG_NOSIGNAL | MSG_DONTWAIT);
		} else if (late && ++good >= GOOD_BEATS) {
			late = 0;
			say("recovered", "beats are in time again", now - last);
			(void)!send(BEATS, "recovered", 9, MSG_NOSIGNAL | MSG_DONTWAIT);
		}
		last = now;
	}
}

int main(int argc, char **argv)
{
	/* Ctrl-C and a session's hang-up are the supervisor's business. */
	static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGPIPE, 0 };
	struct sched_param first = { .sched_priority = 1 };
	const char *why;

	if (argc < 8 || strcmp(argv[6], "--"))
		return 125;
	run = argv[1];
	cgroup = argv[2];
	for (int n = 0; ignored[n]; n++)
		signal(ignored[n], SIG_IGN);
	setsid();
	/* Before every ordinary process: an agent that burns CPU cannot starve the watchdog. */
	if (sched_setscheduler(0, SCHED_RR, &first))
		setpriority(PRIO_PROCESS, 0, -20);
	if (write(ENTER, "0", 1) != 1 || write(1, "watching\n", 9) != 9)
		return 125;
	close(ENTER);
	close(1);
	while ((why = watch(atol(argv[3]), atol(argv[4])))) {
		if (strcmp(argv[5], "open") || held_as("init") < 0)
			close_run(why, argv + 7);
		keep_open(why, argv + 7);
	}
	return 0;
}
