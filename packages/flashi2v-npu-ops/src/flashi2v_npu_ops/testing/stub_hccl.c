/* HCCL between processes of one machine that have no NPU: what torch_npu's ProcessGroupHCCL calls, by messages in files.
 *
 * A message is a file on a RAM disk, so that sending never waits; receiving waits until there is one, as long as
 * HCCL_EXEC_TIMEOUT says. Each bears what was sent: kind of operation, dtype, operation of a reduction, count. A rank
 * that takes part in it with another one is told so. On NPUs such ranks hang, or compute nonsense.
 *
 * Signatures and numbers are those of torch_npu's include/hccl, supported dtypes those of its comments. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, E_PARA = 1, E_NOT_SUPPORT = 5, E_SYSCALL = 8, E_TIMEOUT = 9 };
enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BFP16, NUM_TYPES };
enum { SUM, PROD, MAX, MIN };
static const char *TYPES[] = {"int8", "int16", "int32", "fp16", "fp32", "int64", "uint64", "uint8", "uint16", "uint32",
                              "fp64", "bf16"};
static const size_t SIZES[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
static const char *OPERATIONS[] = {"sum", "prod", "max", "min", "no reduction"};
enum { NO_REDUCTION = 4 };

extern char stub_cann_error[512]; /* what torch_npu adds to its errors */
int stub_cann_fault(const char *function, unsigned *calls);

#define MAY_FAIL                                         \
    do {                                                 \
        static unsigned calls;                           \
        int fault = stub_cann_fault(__func__, &calls);   \
        if (fault) return fault;                         \
    } while (0)

typedef struct {
    uint32_t size, rank;
    char name[128];     /* prefix of its messages */
    uint64_t *sent, *received; /* how many messages, by peer */
} Comm;

typedef struct {
    char kind[16];
    int32_t type, operation;
    uint64_t count; /* elements of this message */
} Header;

static int refuse(int code, const char *format, const char *kind, const char *what)
{
    snprintf(stub_cann_error, sizeof stub_cann_error, format, kind, what);
    return code;
}

static void path_of(char *path, size_t room, const Comm *comm, uint32_t from, uint32_t to, uint64_t number)
{
    snprintf(path, room, "%s.%u.%u.%llu", comm->name, from, to, (unsigned long long)number);
}

static int put(Comm *comm, uint32_t to, const Header *header, const void *data)
{
    char path[256], part[272];
    path_of(path, sizeof path, comm, comm->rank, to, comm->sent[to]++);
    snprintf(part, sizeof part, "%s.part", path);
    FILE *file = fopen(part, "wb");
    if (!file) return refuse(E_SYSCALL, "the stub of HCCL cannot write %s: %s", part, strerror(errno));
    size_t size = header->count * SIZES[header->type];
    int whole = fwrite(header, sizeof *header, 1, file) == 1 && (!size || fwrite(data, size, 1, file) == 1);
    if (fclose(file) || !whole || rename(part, path)) {
        return refuse(E_SYSCALL, "the stub of HCCL cannot write %s: %s", part, strerror(errno));
    }
    return SUCCESS;
}

static int take(Comm *comm, uint32_t from, const Header *header, void *data)
{
    char path[256], text[200];
    path_of(path, sizeof path, comm, from, comm->rank, comm->received[from]++);
    const char *wanted = getenv("HCCL_EXEC_TIMEOUT");
    time_t deadline = time(NULL) + (wanted && atoi(wanted) > 0 ? atoi(wanted) : 1836);
    FILE *file;
    for (unsigned pause = 20; !(file = fopen(path, "rb")); pause = pause < 2000 ? pause * 2 : pause) {
        if (time(NULL) >= deadline) {
            snprintf(text, sizeof text, "rank %u did not take part within HCCL_EXEC_TIMEOUT", from);
            return refuse(E_TIMEOUT, "HCCL %s timed out: %s", header->kind, text);
        }
        usleep(pause);
    }
    Header theirs;
    int whole = fread(&theirs, sizeof theirs, 1, file) == 1;
    int equal = whole && !memcmp(&theirs, header, sizeof theirs);
    size_t size = header->count * SIZES[header->type];
    if (equal && size) whole = fread(data, size, 1, file) == 1;
    fclose(file);
    unlink(path);
    if (whole && equal) return SUCCESS;
    snprintf(text, sizeof text, "rank %u has %s of %llu x %s (%s), rank %u %s of %llu x %s (%s)", comm->rank, header->kind,
             (unsigned long long)header->count, TYPES[header->type], OPERATIONS[header->operation], from, theirs.kind,
             (unsigned long long)theirs.count, TYPES[theirs.type], OPERATIONS[theirs.operation]);
    return refuse(E_PARA, "HCCL %s: all ranks must do the same: %s", header->kind, text);
}

static Header header_of(const char *kind, uint64_t count, int type, int operation)
{
    Header header;
    memset(&header, 0, sizeof header);
    strncpy(header.kind, kind, sizeof header.kind - 1);
    header.type = type, header.operation = operation, header.count = count;
    return header;
}

static int check_type(const char *kind, int type, int reduces)
{
    if (type < 0 || type >= NUM_TYPES) return refuse(E_NOT_SUPPORT, "HCCL %s: %s", kind, "unknown dtype");
    int summed = type == INT8 || type == INT16 || type == INT32 || type == INT64 || type == FP16 || type == FP32 || type == BFP16;
    if (reduces && !summed) return refuse(E_NOT_SUPPORT, "HCCL %s takes no %s", kind, TYPES[type]);
    return SUCCESS;
}

/* Numbers: each is read as a double, or as an int64. */
static float bf16_to_float(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static uint16_t float_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define COMBINE(a, b) (operation == SUM ? (a) + (b) : operation == PROD ? (a) * (b) : ((a) > (b)) == (operation == MAX) ? (a) : (b))
#define REDUCE(T)                                                                     \
    for (uint64_t i = 0; i < count; i++) {                                            \
        ((T *)into)[i] = (T)COMBINE(((T *)into)[i], ((const T *)from)[i]);            \
    }                                                                                 \
    break

static void combine(void *into, const void *from, uint64_t count, int type, int operation)
{
    switch (type) {
    case INT8: REDUCE(int8_t);
    case INT16: REDUCE(int16_t);
    case INT32: REDUCE(int32_t);
    case INT64: REDUCE(int64_t);
    case FP16: REDUCE(_Float16);
    case FP32: REDUCE(float);
    case BFP16:
        for (uint64_t i = 0; i < count; i++) {
            float a = bf16_to_float(((uint16_t *)into)[i]), b = bf16_to_float(((const uint16_t *)from)[i]);
            ((uint16_t *)into)[i] = float_to_bf16(COMBINE(a, b));
        }
    }
}

/* Communicators */
int HcclGetRootInfo(char *info)
{
    static unsigned number;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const char *directory = access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(info, 100, "%s/stub_hccl.%d.%ld.%u", directory, (int)getpid(), now.tv_nsec, number++);
    return SUCCESS;
}

int HcclCommInitRootInfo(uint32_t size, const char *info, uint32_t rank, Comm **comm)
{
    MAY_FAIL;
    *comm = calloc(1, sizeof **comm);
    (*comm)->size = size, (*comm)->rank = rank;
    (*comm)->sent = calloc(2 * size, sizeof(uint64_t));
    (*comm)->received = (*comm)->sent + size;
    strncpy((*comm)->name, info, sizeof (*comm)->name - 1);
    return SUCCESS;
}

int HcclCommInitRootInfoConfig(uint32_t size, const char *info, uint32_t rank, const void *config, Comm **comm)
{
    (void)config;
    return HcclCommInitRootInfo(size, info, rank, comm);
}

int HcclCommDestroy(Comm *comm)
{
    free(comm->sent);
    free(comm);
    return SUCCESS;
}

int HcclGetCommName(const Comm *comm, char *name) { strcpy(name, comm->name); return SUCCESS; }
int HcclGetCommAsyncError(const Comm *comm, int *error) { (void)comm; *error = SUCCESS; return SUCCESS; }
uint32_t HcclGetCommConfigCapability(void) { return 0; }
int HcclSetConfig(void) { return SUCCESS; }
int HcclCommWorkingDevNicSet(void) { return E_NOT_SUPPORT; }
int HcclCommResume(void) { return E_NOT_SUPPORT; }

/* Everybody gives each other a part (counts and displacements in elements), and takes one from each. */
static int exchange(Comm *comm, const char *kind, const char *send, const uint64_t *send_counts, const uint64_t *send_at,
                    char *receive, const uint64_t *receive_counts, const uint64_t *receive_at, int type)
{
    int fault = check_type(kind, type, 0);
    for (uint32_t step = 1; !fault && step <= comm->size; step++) {
        uint32_t to = (comm->rank + step) % comm->size;
        Header header = header_of(kind, send_counts[to], type, NO_REDUCTION);
        if (to != comm->rank) fault = put(comm, to, &header, send + send_at[to] * SIZES[type]);
    }
    for (uint32_t from = 0; !fault && from < comm->size; from++) {
        char *at = receive + receive_at[from] * SIZES[type];
        Header header = header_of(kind, receive_counts[from], type, NO_REDUCTION);
        if (from != comm->rank) fault = take(comm, from, &header, at);
        else memmove(at, send + send_at[from] * SIZES[type], receive_counts[from] * SIZES[type]);
    }
    return fault;
}

int HcclAlltoAllV(const void *send, const uint64_t *send_counts, const uint64_t *send_at, int send_type, void *receive,
                  const uint64_t *receive_counts, const uint64_t *receive_at, int receive_type, Comm *comm, void *stream)
{
    (void)receive_type, (void)stream;
    return exchange(comm, "AlltoAll", send, send_counts, send_at, receive, receive_counts, receive_at, send_type);
}

static int evenly(Comm *comm, const char *kind, const void *send, uint64_t step, void *receive, uint64_t count, int type)
{
    uint64_t *counts = calloc(3 * comm->size, sizeof *counts), *from_at = counts + comm->size, *to_at = from_at + comm->size;
    for (uint32_t rank = 0; rank < comm->size; rank++) {
        counts[rank] = count, from_at[rank] = rank * step, to_at[rank] = rank * count;
    }
    int fault = exchange(comm, kind, send, counts, from_at, receive, counts, to_at, type);
    free(counts);
    return fault;
}

int HcclAlltoAll(const void *send, uint64_t count, int type, void *receive, uint64_t receive_count, int receive_type,
                 Comm *comm, void *stream)
{
    (void)receive_count, (void)receive_type, (void)stream;
    return evenly(comm, "AlltoAll", send, count, receive, count, type);
}

int HcclAllGather(const void *send, void *receive, uint64_t count, int type, Comm *comm, void *stream)
{
    MAY_FAIL;
    (void)stream;
    return evenly(comm, "AllGather", send, 0, receive, count, type);
}

/* Reduce `count` elements of each rank; parts for others are theirs, at `step` elements from one rank to the next. */
static int reduce(Comm *comm, const char *kind, const char *send, uint64_t step, void *receive, uint64_t count, int type,
                  int operation)
{
    int fault = check_type(kind, type, 1);
    if (fault || !count) return fault;
    size_t size = count * SIZES[type];
    Header header = header_of(kind, count, type, operation);
    for (uint32_t to = 0; !fault && to < comm->size; to++) {
        if (to != comm->rank) fault = put(comm, to, &header, send + to * step * SIZES[type]);
    }
    char *parts = malloc(size * comm->size); /* in the order of the ranks, so that all compute the same */
    for (uint32_t from = 0; !fault && from < comm->size; from++) {
        if (from != comm->rank) fault = take(comm, from, &header, parts + from * size);
        else memcpy(parts + from * size, send + from * step * SIZES[type], size);
        if (!fault && from) combine(parts, parts + from * size, count, type, operation);
    }
    if (!fault) memcpy(receive, parts, size);
    free(parts);
    return fault;
}

int HcclAllReduce(const void *send, void *receive, uint64_t count, int type, int operation, Comm *comm, void *stream)
{
    MAY_FAIL;
    (void)stream;
    return reduce(comm, "AllReduce", send, 0, receive, count, type, operation);
}

int HcclReduceScatter(const void *send, void *receive, uint64_t count, int type, int operation, Comm *comm, void *stream)
{
    MAY_FAIL;
    (void)stream;
    return reduce(comm, "ReduceScatter", send, count, receive, count, type, operation);
}

int HcclReduce(const void *send, void *receive, uint64_t count, int type, int operation, uint32_t root, Comm *comm,
               void *stream)
{
    (void)stream;
    void *out = comm->rank == root ? receive : malloc(count * SIZES[type]);
    int fault = reduce(comm, "Reduce", send, 0, out, count, type, operation);
    if (out != receive) free(out);
    return fault;
}

int HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, Comm *comm, void *stream)
{
    (void)stream;
    int fault = check_type("Broadcast", type, 0);
    Header header = header_of("Broadcast", count, type, NO_REDUCTION);
    if (!fault && comm->rank != root) return take(comm, root, &header, data);
    for (uint32_t to = 0; !fault && to < comm->size; to++) {
        if (to != root) fault = put(comm, to, &header, data);
    }
    return fault;
}

int HcclScatter(const char *send, void *receive, uint64_t count, int type, uint32_t root, Comm *comm, void *stream)
{
    (void)stream;
    int fault = check_type("Scatter", type, 0);
    Header header = header_of("Scatter", count, type, NO_REDUCTION);
    if (!fault && comm->rank != root) return take(comm, root, &header, receive);
    for (uint32_t to = 0; !fault && to < comm->size; to++) {
        const char *part = send + to * count * SIZES[type];
        if (to != root) fault = put(comm, to, &header, part);
        else memmove(receive, part, count * SIZES[type]);
    }
    return fault;
}

int HcclBarrier(Comm *comm, void *stream)
{
    int8_t nothing = 0;
    return HcclAllReduce(&nothing, &nothing, 1, INT8, SUM, comm, stream);
}

int HcclSend(const void *data, uint64_t count, int type, uint32_t to, Comm *comm, void *stream)
{
    (void)stream;
    Header header = header_of("Send", count, type, NO_REDUCTION);
    int fault = check_type("Send", type, 0);
    return fault ? fault : put(comm, to, &header, data);
}

int HcclRecv(void *data, uint64_t count, int type, uint32_t from, Comm *comm, void *stream)
{
    (void)stream;
    Header header = header_of("Send", count, type, NO_REDUCTION);
    int fault = check_type("Recv", type, 0);
    return fault ? fault : take(comm, from, &header, data);
}

typedef struct {
    int receives;
    void *data;
    uint64_t count;
    int type;
    uint32_t peer;
} Item;

int HcclBatchSendRecv(const Item *items, uint32_t num, Comm *comm, void *stream)
{
    int fault = SUCCESS;
    for (int receives = 0; receives < 2; receives++) { /* what is sent first: nobody waits for another */
        for (uint32_t i = 0; !fault && i < num; i++) {
            const Item *item = items + i;
            if (item->receives != receives) continue;
            fault = receives ? HcclRecv(item->data, item->count, item->type, item->peer, comm, stream)
                             : HcclSend(item->data, item->count, item->type, item->peer, comm, stream);
        }
    }
    return fault;
}
