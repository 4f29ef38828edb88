/* Counts the calls that change files of a lab, fails one of them, or writes all of them down.
 *
 * Preloaded (LD_PRELOAD) into a Python process, whose sqlite calls the same functions. Nothing
 * happens until io_arm() names the lab; the log of a test and the data are left out.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum action { KILL = -1 }; /* else an errno */

static char lab[PATH_MAX];
static int record = -1; /* file that calls are written to */
static long count, fail_at;
static int action;
static char failed[64]; /* the call that was failed */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void io_arm(const char *folder, long at, int what, int file) {
    count = 0, fail_at = at, action = what, record = file;
    strncpy(lab, folder, sizeof lab - 1);
}

long io_count(void) { return count; }
const char *io_failed(void) { return failed; }

static int is_ours(const char *path) {
    size_t length = strlen(lab);
    return length && !strncmp(path, lab, length) && path[length] == '/' &&
           !strstr(path, "/log.txt") && !strstr(path, "-shm");
}

static int path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return is_ours(path);
}

/* Write a call down: its name, path, offset or second path, and data. */
static void note(const char *call, const char *path, const char *more, const void *data, size_t n) {
    char head[2 * PATH_MAX + 128];
    int length = snprintf(head, sizeof head, "%s\t%s\t%s\t%zu\n", call, path, more, n);
    syscall(SYS_write, record, head, (size_t)length);
    if (n) syscall(SYS_write, record, data, n);
}

/* Count a call on a path of the lab; return whether it is the one that fails. */
static int fails(const char *call, const char *path) {
    if (!lab[0] || !is_ours(path)) return 0;
    pthread_mutex_lock(&lock);
    int is_it = ++count == fail_at;
    pthread_mutex_unlock(&lock);
    if (!is_it) return 0;
    snprintf(failed, sizeof failed, "%s", call);
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = action;
    return 1;
}

static ssize_t written(int file, const void *data, ssize_t n, off_t at, const char *path) {
    if (n > 0 && record >= 0) {
        char offset[32];
        /* at < 0: where the file stands now, behind what was written */
        snprintf(offset, sizeof offset, "%lld",
                 (long long)(at >= 0 ? at : lseek(file, 0, SEEK_CUR) - n));
        note("write", path, offset, data, (size_t)n);
    }
    return n;
}

ssize_t write(int file, const void *data, size_t n) {
    char path[PATH_MAX];
    if (!lab[0] || !path_of(file, path)) return REAL(write)(file, data, n);
    if (fails("write", path)) return -1;
    return written(file, data, REAL(write)(file, data, n), -1, path);
}

ssize_t pwrite64(int file, const void *data, size_t n, off64_t at) {
    char path[PATH_MAX];
    if (!lab[0] || !path_of(file, path)) return REAL(pwrite64)(file, data, n, at);
    if (fails("pwrite64", path)) return -1;
    return written(file, data, REAL(pwrite64)(file, data, n, at), at, path);
}

ssize_t pwrite(int file, const void *data, size_t n, off_t at) { return pwrite64(file, data, n, at); }

/* Python copies a file with it; here the data goes the way of all others. */
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) {
    char path[PATH_MAX];
    if (!lab[0] || !path_of(to, path)) return REAL(sendfile64)(to, from, at, n);
    errno = EINVAL; /* Python falls back on read and write */
    return -1;
}

ssize_t sendfile(int to, int from, off_t *at, size_t n) { return sendfile64(to, from, at, n); }

#define SYNC(name)                                                     \
    int name(int file) {                                               \
        char path[PATH_MAX];                                           \
        if (!lab[0] || !path_of(file, path)) {                         \
            if (lab[0] && !strcmp(path, lab) && record >= 0)           \
                note("sync", path, "", NULL, 0);                       \
            return REAL(name)(file);                                   \
        }                                                              \
        if (fails(#name, path)) return -1;                             \
        if (record >= 0) note("sync", path, "", NULL, 0);              \
        return REAL(name)(file);                                       \
    }
SYNC(fsync)
SYNC(fdatasync)

int syncfs(int file) {
    if (lab[0] && record >= 0) note("syncfs", lab, "", NULL, 0);
    return REAL(syncfs)(file);
}

int ftruncate64(int file, off64_t size) {
    char path[PATH_MAX], text[32];
    if (!lab[0] || !path_of(file, path)) return REAL(ftruncate64)(file, size);
    if (fails("ftruncate", path)) return -1;
    snprintf(text, sizeof text, "%lld", (long long)size);
    if (record >= 0) note("truncate", path, text, NULL, 0);
    return REAL(ftruncate64)(file, size);
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }

int truncate64(const char *path, off64_t size) {
    char text[32];
    if (!lab[0] || !is_ours(path)) return REAL(truncate64)(path, size);
    if (fails("ftruncate", path)) return -1;
    snprintf(text, sizeof text, "%lld", (long long)size);
    if (record >= 0) note("truncate", path, text, NULL, 0);
    return REAL(truncate64)(path, size);
}

int truncate(const char *path, off_t size) { return truncate64(path, size); }

int rename(const char *from, const char *to) {
    if (fails("rename", to)) return -1;
    int result = REAL(rename)(from, to);
    if (!result && lab[0] && record >= 0 && is_ours(to)) note("rename", from, to, NULL, 0);
    return result;
}

int unlink(const char *path) {
    if (fails("unlink", path)) return -1;
    int result = REAL(unlink)(path);
    if (!result && lab[0] && record >= 0 && is_ours(path)) note("unlink", path, "", NULL, 0);
    return result;
}

/* shutil.rmtree works with the descriptor of a folder. */
int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX], whole[2 * PATH_MAX];
    if (!lab[0] || folder == AT_FDCWD || !path_of(folder, path))
        return REAL(unlinkat)(folder, name, flags);
    snprintf(whole, sizeof whole, "%s/%s", path, name);
    if (fails("unlink", whole)) return -1;
    int result = REAL(unlinkat)(folder, name, flags);
    if (!result && record >= 0) note(flags & AT_REMOVEDIR ? "rmdir" : "unlink", whole, "", NULL, 0);
    return result;
}

int rmdir(const char *path) {
    int result = REAL(rmdir)(path);
    if (!result && lab[0] && record >= 0 && is_ours(path)) note("rmdir", path, "", NULL, 0);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    if (fails("mkdir", path)) return -1;
    int result = REAL(mkdir)(path, mode);
    if (!result && lab[0] && record >= 0 && is_ours(path)) note("mkdir", path, "", NULL, 0);
    return result;
}

static int opened(const char *path, int flags, mode_t mode) {
    int is_new = flags & O_CREAT && access(path, F_OK);
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (file >= 0 && lab[0] && record >= 0 && is_ours(path)) {
        if (is_new) note("create", path, "", NULL, 0);
        if (flags & O_TRUNC && !is_new) note("truncate", path, "0", NULL, 0);
    }
    return file;
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened(path, flags, mode);
}
