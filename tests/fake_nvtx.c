// An NVTX library that counts: at the process's end it writes to the file that
// FAKE_NVTX names each range's name with how often it began, and `open` with how
// many did not end.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct { char name[64]; long count; } seen[64];
static long begun, ended;

int nvtxRangePushA(const char *name) {
    for (int i = 0; i < 64; i++) {
        if (!seen[i].name[0]) {
            strncpy(seen[i].name, name, sizeof seen[i].name - 1);
        }
        if (!strcmp(seen[i].name, name)) {
            __atomic_add_fetch(&seen[i].count, 1, __ATOMIC_RELAXED);
            break;
        }
    }
    return __atomic_add_fetch(&begun, 1, __ATOMIC_RELAXED);
}

int nvtxRangePop(void) { return __atomic_add_fetch(&ended, 1, __ATOMIC_RELAXED); }

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAKE_NVTX");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) {
        return;
    }
    for (int i = 0; i < 64 && seen[i].name[0]; i++) {
        fprintf(file, "%s %ld\n", seen[i].name, seen[i].count);
    }
    fprintf(file, "open %ld\n", begun - ended);
    fclose(file);
}
