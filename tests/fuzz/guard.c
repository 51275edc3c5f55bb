/* Ends a process that starts a program or opens a connection, whoever in it does: FFmpeg and torch ask no Python.
 *
 * Loaded by LD_PRELOAD and armed by `guard_arm()`, in a process that reads hostile input and has no business with either.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static int is_armed;

void guard_arm(void) { is_armed = 1; }

static void refuse(const char *what) {
    if (!is_armed)
        return;
    fprintf(stderr, "guard: %s\n", what);
    kill(getpid(), SIGUSR2); /* whose default is the end; told by its number */
}

#define PASS(type, function, parameters, arguments)                      \
    type function parameters {                                           \
        refuse(#function);                                               \
        return ((type(*) parameters)dlsym(RTLD_NEXT, #function)) arguments; \
    }

PASS(int, connect, (int fd, const struct sockaddr *to, socklen_t size), (fd, to, size))
PASS(int, getaddrinfo, (const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r), (n, s, h, r))
PASS(int, execve, (const char *path, char *const a[], char *const e[]), (path, a, e))
PASS(int, execv, (const char *path, char *const a[]), (path, a))
PASS(int, execvp, (const char *path, char *const a[]), (path, a))
PASS(int, posix_spawn, (pid_t *p, const char *path, const posix_spawn_file_actions_t *f, const posix_spawnattr_t *t, char *const a[], char *const e[]), (p, path, f, t, a, e))
PASS(int, posix_spawnp, (pid_t *p, const char *path, const posix_spawn_file_actions_t *f, const posix_spawnattr_t *t, char *const a[], char *const e[]), (p, path, f, t, a, e))
