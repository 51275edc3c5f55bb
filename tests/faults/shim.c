/* Strikes one file operation of a process, or of all its children together: the one of a given number.
 *
 * Loaded by LD_PRELOAD, it stands between programs and libc: Python, torch, LMDB, FFmpeg and safetensors alike. What it
 * counts are operations on files below one directory, in the order in which they are begun. At the number that was asked
 * for it kills the process, interrupts its group, or lets the operation fail.
 *
 *   FAULTS_DIRECTORY  operations below it are counted; it must be absolute and without symbolic links
 *   FAULTS_STATE      a file of `struct state`, shared by all processes
 *   FAULTS_NUMBER     the operation to strike, counted from 1; 0 only counts
 *   FAULTS_KIND       kill, interrupt, ENOSPC, EIO or EACCES
 *   FAULTS_TRACE      a file that gets a line for every operation, where nothing is struck
 *
 * A process that lives already reads them again by `faults_arm()`. Two choices make strikes as bad as they get: a write
 * that is struck by "kill" has written half of its bytes, and a disk that is full stays full for all that needs room,
 * until the processes end. Not seen are stores through a writable memory map; no package makes any.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct state {
    uint64_t count;    /* operations begun so far */
    char struck[4096]; /* what was struck: "write a/b"; empty before */
};

static struct state *state; /* NULL: nothing is counted */
static char directory[PATH_MAX];
static size_t directory_length;
static uint64_t number;
static int trace = -1; /* descriptor */
static int kills, interrupts, error; /* of the kinds, exactly one is set; `error` is an errno */

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);

static void *real(const char *name) {
    return dlsym(RTLD_NEXT, name);
}

__attribute__((constructor)) void faults_arm(void) {
    const char *below = getenv("FAULTS_DIRECTORY"), *file = getenv("FAULTS_STATE"), *kind = getenv("FAULTS_KIND");
    const char *strikes = getenv("FAULTS_NUMBER");
    real_write = real("write");
    real_pwrite = real("pwrite");
    state = NULL;
    if (!below || !file || !kind || !strikes)
        return;
    directory_length = strlen(below);
    if (directory_length >= sizeof directory)
        return;
    strcpy(directory, below);
    number = strtoull(strikes, NULL, 10);
    kills = !strcmp(kind, "kill");
    interrupts = !strcmp(kind, "interrupt");
    error = !strcmp(kind, "ENOSPC") ? ENOSPC : !strcmp(kind, "EIO") ? EIO : !strcmp(kind, "EACCES") ? EACCES : 0;
    const char *lines = getenv("FAULTS_TRACE");
    trace = number || !lines ? -1 : syscall(SYS_openat, AT_FDCWD, lines, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int descriptor = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return;
    void *shared = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    syscall(SYS_close, descriptor);
    if (shared != MAP_FAILED)
        state = shared;
}

/* Whether a path, of which `folder` is where relative ones begin, lies below the directory; `full` becomes absolute. */
static int is_below(int folder, const char *path, char full[PATH_MAX]) {
    full[0] = 0;
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(folder == AT_FDCWD ? "/proc/self/cwd" : link, full, PATH_MAX - 1);
        if (length < 0)
            return 0;
        full[length] = 0;
        if (path[0])
            strncat(full, "/", PATH_MAX - 1 - strlen(full));
    }
    strncat(full, path, PATH_MAX - 1 - strlen(full));
    return !strncmp(full, directory, directory_length) && (full[directory_length] == '/' || !full[directory_length]);
}

enum need { NOTHING, ROOM }; /* what an operation takes from a disk */
enum { TEAR = -1 };          /* half a write, then the end */

/* Count an operation; return 0, the errno it fails with, or TEAR. May not return. */
static int strike(const char *name, int folder, const char *path, enum need need) {
    char full[PATH_MAX];
    int before = errno;
    if (!state || !path || !is_below(folder, path, full)) {
        errno = before;
        return 0;
    }
    errno = before;
    uint64_t own = __atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", name, full + directory_length);
        syscall(SYS_write, trace, line, length);
        errno = before;
    }
    if (!number || own < number)
        return 0;
    if (own > number) /* a full disk stays full */
        return error == ENOSPC && need == ROOM ? ENOSPC : 0;
    snprintf(state->struck, sizeof state->struck, "%s %s", name, full + directory_length);
    if (interrupts)
        kill(0, SIGINT);
    if (kills && (!strcmp(name, "write") || !strcmp(name, "pwrite")))
        return TEAR;
    if (kills)
        kill(getpid(), SIGKILL);
    return error == ENOSPC && need == NOTHING ? 0 : error;
}

static void end(void) {
    kill(getpid(), SIGKILL);
}

/* Return from the function around it where the operation is struck. */
#define STRIKE(name, folder, path, need)                     \
    do {                                                     \
        int struck = strike(name, folder, path, need);       \
        if (struck) {                                        \
            errno = struck;                                  \
            return -1;                                       \
        }                                                    \
    } while (0)
#define STRIKE_FILE(name, descriptor, need) STRIKE(name, descriptor, "", need)

/* Opening. Fortified programs call the names that begin with underscores. */

#define MODE(flags, mode)                                              \
    mode_t mode = 0;                                                   \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                             \
        va_list more;                                                  \
        va_start(more, flags);                                         \
        mode = va_arg(more, mode_t);                                   \
        va_end(more);                                                  \
    }
#define OPEN_NAME(flags) ((flags) & O_ACCMODE ? "open to write" : "open to read")
#define OPEN_NEED(flags) ((flags) & O_CREAT ? ROOM : NOTHING)

#define OPEN(function)                                                                 \
    int function(const char *path, int flags, ...) {                                   \
        MODE(flags, mode)                                                              \
        STRIKE(OPEN_NAME(flags), AT_FDCWD, path, OPEN_NEED(flags));                    \
        return syscall(SYS_openat, AT_FDCWD, path, flags | O_LARGEFILE, mode);         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                               \
    int function(int folder, const char *path, int flags, ...) {                       \
        MODE(flags, mode)                                                              \
        STRIKE(OPEN_NAME(flags), folder, path, OPEN_NEED(flags));                      \
        return syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);           \
    }
OPENAT(openat)
OPENAT(openat64)

int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open(path, flags); }
int __openat_2(int folder, const char *path, int flags) { return openat(folder, path, flags); }
int __openat64_2(int folder, const char *path, int flags) { return openat(folder, path, flags); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN(function)                                                                        \
    FILE *function(const char *path, const char *mode) {                                       \
        static FILE *(*next)(const char *, const char *);                                      \
        if (!next)                                                                             \
            next = real(#function);                                                            \
        int writes = mode[0] != 'r';                                                           \
        int struck = strike(writes ? "open to write" : "open to read", AT_FDCWD, path, writes ? ROOM : NOTHING); \
        if (struck) {                                                                          \
            errno = struck;                                                                    \
            return NULL;                                                                       \
        }                                                                                      \
        return next(path, mode);                                                               \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Reading and writing. */

ssize_t write(int descriptor, const void *bytes, size_t size) {
    int struck = strike("write", descriptor, "", ROOM);
    if (struck == TEAR) {
        real_write(descriptor, bytes, size / 2);
        end();
    }
    if (struck) {
        errno = struck;
        return -1;
    }
    return real_write(descriptor, bytes, size);
}

static ssize_t write_at(int descriptor, const void *bytes, size_t size, off_t offset) {
    int struck = strike("pwrite", descriptor, "", ROOM);
    if (struck == TEAR) {
        real_pwrite(descriptor, bytes, size / 2, offset);
        end();
    }
    if (struck) {
        errno = struck;
        return -1;
    }
    return real_pwrite(descriptor, bytes, size, offset);
}
ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t offset) {
    return write_at(descriptor, bytes, size, offset);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off_t offset) {
    return write_at(descriptor, bytes, size, offset);
}

/* All other functions are passed on by name: result, name, need, descriptor or folder and path, parameters, arguments. */
#define PASS(type, function, name, need, folder, path, parameters, arguments) \
    type function parameters {                                               \
        static type(*next) parameters;                                       \
        if (!next)                                                           \
            next = real(#function);                                          \
        STRIKE(name, folder, path, need);                                    \
        return next arguments;                                               \
    }

PASS(ssize_t, writev, "writev", ROOM, fd, "", (int fd, const struct iovec *parts, int n), (fd, parts, n))
PASS(ssize_t, pwritev, "pwritev", ROOM, fd, "", (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at))
PASS(ssize_t, pwritev64, "pwritev", ROOM, fd, "", (int fd, const struct iovec *parts, int n, off_t at), (fd, parts, n, at))
PASS(ssize_t, sendfile, "sendfile", ROOM, to, "", (int to, int from, off_t *at, size_t n), (to, from, at, n))
PASS(ssize_t, sendfile64, "sendfile", ROOM, to, "", (int to, int from, off_t *at, size_t n), (to, from, at, n))
PASS(ssize_t, read, "read", NOTHING, fd, "", (int fd, void *bytes, size_t n), (fd, bytes, n))
PASS(ssize_t, pread, "read", NOTHING, fd, "", (int fd, void *bytes, size_t n, off_t at), (fd, bytes, n, at))
PASS(ssize_t, pread64, "read", NOTHING, fd, "", (int fd, void *bytes, size_t n, off_t at), (fd, bytes, n, at))
PASS(int, ftruncate, "truncate", ROOM, fd, "", (int fd, off_t size), (fd, size))
PASS(int, ftruncate64, "truncate", ROOM, fd, "", (int fd, off_t size), (fd, size))
PASS(int, truncate, "truncate", ROOM, AT_FDCWD, path, (const char *path, off_t size), (path, size))
PASS(int, truncate64, "truncate", ROOM, AT_FDCWD, path, (const char *path, off_t size), (path, size))
PASS(int, fsync, "sync", ROOM, fd, "", (int fd), (fd))
PASS(int, fdatasync, "sync", ROOM, fd, "", (int fd), (fd))

/* Names. */

PASS(int, rename, "rename", NOTHING, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PASS(int, renameat, "rename", NOTHING, b, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
PASS(int, renameat2, "rename", NOTHING, b, to, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags))
PASS(int, link, "link", NOTHING, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PASS(int, linkat, "link", NOTHING, b, to, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
PASS(int, symlink, "link", ROOM, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PASS(int, mkdir, "mkdir", ROOM, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PASS(int, mkdirat, "mkdir", ROOM, folder, path, (int folder, const char *path, mode_t mode), (folder, path, mode))
PASS(int, unlink, "unlink", NOTHING, AT_FDCWD, path, (const char *path), (path))
PASS(int, unlinkat, "unlink", NOTHING, folder, path, (int folder, const char *path, int flags), (folder, path, flags))
PASS(int, rmdir, "rmdir", NOTHING, AT_FDCWD, path, (const char *path), (path))
PASS(int, chmod, "chmod", NOTHING, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
