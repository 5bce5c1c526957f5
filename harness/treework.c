/* What a container does to a tree, and how long it takes: the measuring program of the benches, so small that
 * the filesystem is measured and not the program. Prints seconds, things done and bytes; names go to nobody.
 *
 *   treework walk DIR                every name, as find lists them: readdir(3) with its types
 *   treework stat DIR                the same with fstatat(2) of every entry
 *   treework read DIR [KIB] <LIST    open, read to the end, close each path of the NUL-terminated list
 *   treework random DIR COUNT <LIST  COUNT reads of 4 KiB at random places of the list's files
 *   treework one DIR OFFSET <LIST    one read of 4 KiB there, of the list's only file
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static uint64_t things, bytes;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void walk(int fd, int with_stat) {
    DIR *dir = fdopendir(fd);
    if (!dir) err(1, "fdopendir");
    char *below = NULL;
    size_t used = 0, room = 0;
    struct dirent *entry;
    while ((entry = readdir(dir))) {
        const char *name = entry->d_name;
        if (!strcmp(name, ".") || !strcmp(name, "..")) continue;
        things++;
        if (with_stat) {
            struct stat st;
            if (fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW)) err(1, "%s", name);
            bytes += st.st_size;
        }
        if (entry->d_type == DT_UNKNOWN) errx(1, "%s: readdir gives no type", name);
        if (entry->d_type != DT_DIR) continue;
        size_t size = strlen(name) + 1;
        if (used + size > room && !(below = realloc(below, room = 2 * room + size))) err(1, "realloc");
        memcpy(below + used, name, size);
        used += size;
    }
    for (size_t at = 0; at < used; at += strlen(below + at) + 1) {
        int inner = openat(fd, below + at, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (inner < 0) err(1, "%s", below + at);
        walk(inner, with_stat);
    }
    free(below);
    closedir(dir);
}

static int open_below(int dir, const char *path) {
    int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) err(1, "%s", path);
    return fd;
}

static void read_files(int dir, const char *list, size_t size, size_t piece) {
    char *buffer = malloc(piece);
    if (!buffer) err(1, "malloc");
    for (const char *path = list; path < list + size; path += strlen(path) + 1, things++) {
        int fd = open_below(dir, path);
        ssize_t got;
        while ((got = read(fd, buffer, piece)) > 0) bytes += got;
        if (got < 0) err(1, "%s", path);
        close(fd);
    }
    free(buffer);
}

static void read_random(int dir, const char *list, size_t size, long count) {
    uint64_t state = 88172645463325252u; /* Marsaglia's xorshift: the same places in every run */
    char buffer[4096];
    size_t files = 0;
    for (const char *path = list; path < list + size; path += strlen(path) + 1) files++;
    int *fds = malloc(files * sizeof *fds);
    uint64_t *ends = malloc(files * sizeof *ends), total = 0;
    if (!fds || !ends) err(1, "malloc");
    size_t number = 0;
    for (const char *path = list; path < list + size; path += strlen(path) + 1, number++) {
        struct stat st;
        fds[number] = open_below(dir, path);
        if (fstat(fds[number], &st)) err(1, "%s", path);
        ends[number] = total += st.st_size / sizeof buffer;
    }
    if (!total) errx(1, "nothing to read");
    for (; count > 0; count--, things++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        uint64_t page = state % total;
        for (number = 0; ends[number] <= page; number++) {}
        uint64_t within = page - (number ? ends[number - 1] : 0);
        ssize_t got = pread(fds[number], buffer, sizeof buffer, within * sizeof buffer);
        if (got != sizeof buffer) err(1, "pread");
        bytes += got;
    }
}

static void read_one(int dir, const char *path, long offset) {
    char buffer[4096];
    int fd = open_below(dir, path);
    ssize_t got = pread(fd, buffer, sizeof buffer, offset);
    if (got != sizeof buffer) err(1, "pread");
    things++, bytes += got;
}

static char *read_list(size_t *size) {
    size_t room = 1 << 20, used = 0;
    char *list = malloc(room);
    ssize_t got;
    while (list && (got = read(0, list + used, room - used)) > 0)
        if ((used += got) == room) list = realloc(list, room *= 2);
    if (!list || got < 0 || (used && list[used - 1])) errx(1, "no list of NUL-terminated paths");
    *size = used;
    return list;
}

int main(int argc, char **argv) {
    if (argc < 3) errx(2, "usage: treework walk|stat|read|random|one DIR [N]");
    const char *what = argv[1];
    long number = argc > 3 ? atol(argv[3]) : 128;
    size_t size = 0;
    char *list = *what == 'r' || *what == 'o' ? read_list(&size) : NULL;
    double started = now();
    int dir = open(argv[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) err(1, "%s", argv[2]);
    if (!strcmp(what, "walk") || !strcmp(what, "stat")) walk(dir, *what == 's');
    else if (!strcmp(what, "read")) read_files(dir, list, size, (size_t)number << 10);
    else if (!strcmp(what, "random")) read_random(dir, list, size, number);
    else if (!strcmp(what, "one")) read_one(dir, list, number);
    else errx(2, "%s: no such work", what);
    printf("%.6f %llu %llu\n", now() - started, (unsigned long long)things, (unsigned long long)bytes);
    return 0;
}
