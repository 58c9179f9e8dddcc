/* Memory that runs out in an engine process: preloaded, it refuses one large allocation when the file SIGN is there, and takes
 * the file away. Everything else goes to the C library, as does every allocation of processes that are no engine.
 *
 * Built with -DSIGN="<path>".
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

/* Above what arrives and leaves, below what is computed with: 30 s of samples are 1.9 MB, a spectrogram 0.9. */
enum { LEAST = 512 * 1024 };

static const char VERB[] = "engine";

extern void *__libc_malloc(size_t size);

/* The arguments of an engine process are `voxfleet engine --fd N`; nothing here may allocate. */
static int is_engine(void) {
    static int known = -1;
    if (known >= 0) {
        return known;
    }
    char line[4096];
    int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? 0 : read(file, line, sizeof line);
    if (file >= 0) {
        close(file);
    }
    const char *verb = length > 0 ? memchr(line, 0, (size_t)length) : NULL;
    size_t left = verb ? (size_t)(line + length - verb) : 0;
    known = left > sizeof VERB && memcmp(verb + 1, VERB, sizeof VERB) == 0;
    return known;
}

void *malloc(size_t size) {
    int before = errno;
    if (size >= LEAST && is_engine() && unlink(SIGN) == 0) {
        errno = ENOMEM;
        return NULL;
    }
    errno = before;
    return __libc_malloc(size);
}
