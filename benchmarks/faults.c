/* Faults that only a library can make: LD_PRELOAD it, with the path of a file of 16 bytes in FAULTS_FILE.

   - The clock is as many seconds ahead as the double at offset 0 says. Only the clock of the calendar: what
     measures time (CLOCK_MONOTONIC) runs on, as it does when somebody sets the clock of a machine.
   - If the integer at offset 8 is N > 0, the Nth call of sendfile kills its process. Python copies files by
     sendfile, and nothing else of Orion's or ours calls it, so a worker dies while it copies a directory.

   gcc -shared -fPIC -O2 -o faults.so faults.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct shared {
    volatile double ahead;
    atomic_int sendfiles;
};
static struct shared none;
static struct shared *shared = &none;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_FILE");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) shared = found;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += (time_t)shared->ahead;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    int result = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return result;
}

time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}

static void count(void) {
    if (shared->sendfiles > 0 && atomic_fetch_sub(&shared->sendfiles, 1) == 1) kill(getpid(), SIGKILL);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t length) {
    count();
    return syscall(SYS_sendfile, out, in, offset, length);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t length) {
    count();
    return syscall(SYS_sendfile, out, in, offset, length);
}
