/*
 * blk_guest.c - first process of a guest that measures its disk when it is told to: a line on
 * standard input names the work and how often, a line on standard output has nanoseconds for each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

#define BLOCK 4096
#define LARGE (1 << 20)

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void die(const char *what)
{
    perror(what);
    fflush(NULL);
    reboot(RB_POWER_OFF);
    exit(1);
}

static void load_modules(void)
{
    char name[64];
    for (int number = 0;; number++) {
        snprintf(name, sizeof name, "/modules/%03d.ko", number);
        int fd = open(name, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0))
            die(name);
        close(fd);
    }
}

int main(void)
{
    mount("dev", "/dev", "devtmpfs", 0, "");
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++)
        dup2(console, fd);
    struct termios mode;
    if (!tcgetattr(0, &mode)) {
        mode.c_lflag &= ~(tcflag_t)ECHO;
        tcsetattr(0, TCSANOW, &mode);
    }
    load_modules();
    int disk = -1;
    for (int tries = 0; disk < 0 && tries < 500; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk < 0)
            usleep(10000);
    }
    uint64_t size = 0;
    void *buffer;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) || posix_memalign(&buffer, LARGE, LARGE))
        die("/dev/vda");
    memset(buffer, 0x5a, LARGE);
    printf("READY %llu\n", (unsigned long long)size);
    fflush(stdout);

    char line[64], kind[16];
    unsigned count;
    uint64_t random = 88172645463325252u, at = 0;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%15s %u", kind, &count) != 2)
            break;
        uint64_t began = now();
        for (unsigned i = 0; i < count; i++) {
            ssize_t done = -1;
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            off_t block = (off_t)(random % (size / BLOCK)) * BLOCK;
            if (!strcmp(kind, "random")) {
                done = pread(disk, buffer, BLOCK, block) - BLOCK;
            } else if (!strcmp(kind, "sequential")) {
                done = pread(disk, buffer, LARGE, (off_t)at) - LARGE;
                at = (at + LARGE) % size;
            } else if (!strcmp(kind, "flushed")) {
                done = pwrite(disk, buffer, BLOCK, block) - BLOCK;
                if (!done)
                    done = fdatasync(disk);
            }
            if (done)
                die(kind);
        }
        printf("DONE %s %llu\n", kind, (unsigned long long)((now() - began) / count));
        fflush(stdout);
    }
    reboot(RB_POWER_OFF);
}
