/* A management library of NVIDIA's interface that shows the cards of a folder: what nvml-wrapper calls, and no more.
 *
 * Built with -DROOT="<folder>". ROOT/card<i> is a card, ROOT/card<i>/mig<j> an instance of it; each holds small text files,
 * read at every call, so that a test changes a card while somebody looks at it:
 *
 *   name, uuid, total_mb, used_mb, temperature, power_mw, utilization, throttle (bits), ecc, mig (1 = split)
 *   processes        lines "<pid> <MB>"; they count as used, beside used_mb
 *   simulated_card   path of a folder with one file of MB per allocation: `<pid>.<n>` of a process, `tenant.<name>` of others
 *   error            code that every call about this card answers with
 *   error_processes  the same for the list of processes alone
 *   hangs            memory is not told until this file is gone
 *   xid              number of an error that is reported once to whoever watches the card; the file is gone then
 *   no_events        the card reports no errors as they happen
 *
 * ROOT/init_error is the code of nvmlInit_v2, ROOT/driver_version and ROOT/library_version what they are called. A file that
 * is not there makes the figure "not supported", as figures of real cards may be.
 */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MOST_CARDS = 16, MOST_INSTANCES = 7, MOST_PROCESSES = 256 };

#define MB (1ULL << 20)

struct card {
    char folder[512];
    unsigned index, parent;
    int is_instance;
};

struct process {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
};

struct memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

struct utilization {
    unsigned gpu, memory;
};

/* Handles are places in these tables and stay good: a card that is gone answers with an error, not with a crash. */
static struct card cards[MOST_CARDS], instances[MOST_CARDS][MOST_INSTANCES];
/* How many users there are: as the real library, it stays ready until the last one has gone. */
static int initialized;

static int read_text(const char *folder, const char *key, char *text, size_t size) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, key);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    size_t length = fread(text, 1, size - 1, file);
    fclose(file);
    while (length > 0 && isspace((unsigned char)text[length - 1])) length--;
    text[length] = 0;
    return 1;
}

static int read_number(const char *folder, const char *key, unsigned long long *number) {
    char text[64];
    if (!read_text(folder, key, text, sizeof text) || !*text) return 0;
    *number = strtoull(text, NULL, 10);
    return 1;
}

static int exists(const char *folder, const char *key) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, key);
    return access(path, F_OK) == 0;
}

static int is_folder(const char *path) {
    struct stat found;
    return stat(path, &found) == 0 && S_ISDIR(found.st_mode);
}

/* 0, or why this card cannot be asked. */
static int trouble(const struct card *card) {
    unsigned long long code;
    if (!initialized) return UNINITIALIZED;
    if (!card) return INVALID_ARGUMENT;
    if (read_number(card->folder, "error", &code)) return (int)code;
    if (card->is_instance && read_number(cards[card->parent].folder, "error", &code)) return (int)code;
    return is_folder(card->folder) ? SUCCESS : NOT_FOUND;
}

static int lives(unsigned pid) {
    return kill((pid_t)pid, 0) == 0 || errno == EPERM;
}

static unsigned add(struct process *list, unsigned count, unsigned pid, unsigned long long mb) {
    for (unsigned i = 0; i < count; i++) {
        if (list[i].pid == pid) {
            list[i].bytes += mb * MB;
            return count;
        }
    }
    if (count == MOST_PROCESSES) return count;
    list[count] = (struct process){pid, mb * MB, 0, 0};
    return count + 1;
}

/* Processes that live, and in `others` the MB that belong to none of them. */
static unsigned users(const struct card *card, struct process *list, unsigned long long *others) {
    char text[8192], folder[512];
    unsigned count = 0;
    *others = 0;
    read_number(card->folder, "used_mb", others);
    if (read_text(card->folder, "processes", text, sizeof text)) {
        char *at = text;
        unsigned pid;
        unsigned long long mb;
        int length;
        while (sscanf(at, "%u %llu%n", &pid, &mb, &length) == 2) {
            count = add(list, count, pid, mb);
            at += length;
        }
    }
    if (!read_text(card->folder, "simulated_card", folder, sizeof folder)) return count;
    DIR *dir = opendir(folder);
    struct dirent *entry;
    while (dir && (entry = readdir(dir))) {
        unsigned long long mb;
        unsigned pid;
        char dot;
        if (strncmp(entry->d_name, "tenant.", 7) == 0) {
            if (read_number(folder, entry->d_name, &mb)) *others += mb;
        } else if (sscanf(entry->d_name, "%u%c", &pid, &dot) == 2 && dot == '.' && lives(pid)) {
            if (read_number(folder, entry->d_name, &mb)) count = add(list, count, pid, mb);
        }
    }
    if (dir) closedir(dir);
    return count;
}

static int text_of(const struct card *card, const char *key, char *text, unsigned size) {
    int code = trouble(card);
    if (code) return code;
    return read_text(card->folder, key, text, size) ? SUCCESS : NOT_SUPPORTED;
}

static int number_of(const struct card *card, const char *key, unsigned *number) {
    unsigned long long found;
    int code = trouble(card);
    if (code) return code;
    if (!read_number(card->folder, key, &found)) return NOT_SUPPORTED;
    *number = (unsigned)found;
    return SUCCESS;
}

int nvmlInit_v2(void) {
    unsigned long long code;
    if (read_number(ROOT, "init_error", &code)) return (int)code;
    initialized++;
    for (unsigned i = 0; i < MOST_CARDS; i++) {
        snprintf(cards[i].folder, sizeof cards[i].folder, "%s/card%u", ROOT, i);
        cards[i].index = i;
        for (unsigned j = 0; j < MOST_INSTANCES; j++) {
            struct card *instance = &instances[i][j];
            snprintf(instance->folder, sizeof instance->folder, "%s/card%u/mig%u", ROOT, i, j);
            instance->index = j;
            instance->parent = i;
            instance->is_instance = 1;
        }
    }
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!initialized) return UNINITIALIZED;
    initialized--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    return code == SUCCESS ? "Success" : "an error of the fake library";
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    return read_text(ROOT, "driver_version", text, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlSystemGetNVMLVersion(char *text, unsigned size) {
    return read_text(ROOT, "library_version", text, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    unsigned long long found;
    if (!read_number(ROOT, "cuda_version", &found)) return NOT_SUPPORTED;
    *version = (int)found;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialized) return UNINITIALIZED;
    for (*count = 0; *count < MOST_CARDS && is_folder(cards[*count].folder); ++*count) {
    }
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct card **card) {
    unsigned count;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code) return code;
    if (index >= count) return INVALID_ARGUMENT;
    *card = &cards[index];
    return SUCCESS;
}

static int is_called(struct card *card, const char *uuid) {
    char text[128];
    return read_text(card->folder, "uuid", text, sizeof text) && strcmp(text, uuid) == 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct card **card) {
    if (!initialized) return UNINITIALIZED;
    for (unsigned i = 0; i < MOST_CARDS; i++) {
        *card = &cards[i];
        if (is_called(*card, uuid)) return trouble(*card);
        for (unsigned j = 0; j < MOST_INSTANCES; j++) {
            *card = &instances[i][j];
            if (is_called(*card, uuid)) return trouble(*card);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(struct card *card, char *text, unsigned size) {
    return text_of(card, "name", text, size);
}

int nvmlDeviceGetUUID(struct card *card, char *text, unsigned size) {
    return text_of(card, "uuid", text, size);
}

int nvmlDeviceGetIndex(struct card *card, unsigned *index) {
    int code = trouble(card);
    if (!code) *index = card->index;
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(struct card *card, struct memory *memory) {
    struct process list[MOST_PROCESSES];
    unsigned long long total, used;
    int code = trouble(card);
    if (code) return code;
    while (exists(card->folder, "hangs")) usleep(20000);
    if (!read_number(card->folder, "total_mb", &total)) return NOT_SUPPORTED;
    unsigned count = users(card, list, &used);
    for (unsigned i = 0; i < count; i++) used += list[i].bytes / MB;
    if (used > total) used = total;
    memory->total = total * MB;
    memory->reserved = 0;
    memory->used = used * MB;
    memory->free = (total - used) * MB;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct card *card, unsigned *room, struct process *to) {
    struct process list[MOST_PROCESSES];
    unsigned long long others, refused;
    int code = trouble(card);
    if (code) return code;
    if (read_number(card->folder, "error_processes", &refused)) return (int)refused;
    unsigned count = users(card, list, &others);
    int fits = count <= *room && to;
    if (fits) memcpy(to, list, count * sizeof *list);
    *room = count;
    return fits || count == 0 ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetTemperature(struct card *card, int sensor, unsigned *celsius) {
    (void)sensor;
    return number_of(card, "temperature", celsius);
}

int nvmlDeviceGetPowerUsage(struct card *card, unsigned *milliwatts) {
    return number_of(card, "power_mw", milliwatts);
}

int nvmlDeviceGetUtilizationRates(struct card *card, struct utilization *rates) {
    rates->memory = 0;
    return number_of(card, "utilization", &rates->gpu);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(struct card *card, unsigned long long *bits) {
    int code = trouble(card);
    if (code) return code;
    return read_number(card->folder, "throttle", bits) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetTotalEccErrors(struct card *card, int kind, int counter, unsigned long long *errors) {
    (void)kind, (void)counter;
    int code = trouble(card);
    if (code) return code;
    return read_number(card->folder, "ecc", errors) ? SUCCESS : NOT_SUPPORTED;
}

/* What somebody watches: one card, as the product does. */
struct event_set {
    struct card *card;
};

struct event {
    struct card *card;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

enum { TIMEOUT = 10 };
static const unsigned long long XID_EVENTS = 8;

int nvmlDeviceGetSupportedEventTypes(struct card *card, unsigned long long *types) {
    int code = trouble(card);
    if (!code) *types = exists(card->folder, "no_events") || card->is_instance ? 0 : XID_EVENTS;
    return code;
}

int nvmlEventSetCreate(struct event_set **set) {
    if (!initialized) return UNINITIALIZED;
    *set = calloc(1, sizeof **set);
    return *set ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceRegisterEvents(struct card *card, unsigned long long types, struct event_set *set) {
    int code = trouble(card);
    if (code) return code;
    if (types != XID_EVENTS || card->is_instance || exists(card->folder, "no_events")) return NOT_SUPPORTED;
    set->card = card;
    return SUCCESS;
}

int nvmlEventSetWait_v2(struct event_set *set, struct event *event, unsigned timeout_ms) {
    char path[1024];
    unsigned long long xid;
    if (!initialized) return UNINITIALIZED;
    if (!set->card || !read_number(set->card->folder, "xid", &xid)) {
        usleep(timeout_ms * 1000);
        return TIMEOUT;
    }
    snprintf(path, sizeof path, "%s/xid", set->card->folder);
    unlink(path);
    *event = (struct event){set->card, XID_EVENTS, xid, ~0u, ~0u};
    return SUCCESS;
}

int nvmlEventSetFree(struct event_set *set) {
    if (!initialized) return UNINITIALIZED;
    free(set);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(struct card *card, unsigned *current, unsigned *pending) {
    int code = number_of(card, "mig", current);
    if (!code) *pending = *current;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(struct card *card, unsigned *count) {
    int code = trouble(card);
    if (!code) *count = MOST_INSTANCES;
    return code;
}

int nvmlDeviceGetMigDeviceHandleByIndex(struct card *card, unsigned index, struct card **instance) {
    int code = trouble(card);
    if (code) return code;
    if (card->is_instance || index >= MOST_INSTANCES) return INVALID_ARGUMENT;
    *instance = &instances[card->index][index];
    return is_folder((*instance)->folder) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceIsMigDeviceHandle(struct card *card, unsigned *is_instance) {
    int code = trouble(card);
    if (!code) *is_instance = (unsigned)card->is_instance;
    return code;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(struct card *instance, struct card **card) {
    if (!instance || !instance->is_instance) return INVALID_ARGUMENT;
    *card = &cards[instance->parent];
    return trouble(*card);
}
