/* What torch_npu needs of CANN, beyond success codes, to work where there is no NPU: devices whose memory is host memory.
 *
 * stubs.py defines the other functions that torch_npu links to: those return 0, ACL_SUCCESS, and write nothing. The
 * signatures are those of torch_npu's include/acl. Arguments that are not used are cast to void, or not declared.
 *
 * All work is done when it is asked for, so streams have an order, and events are complete, without further ado. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef int aclError;

/* Put into every error message as a C string. */
char stub_cann_error[512] = "(this is the stub of CANN, not CANN)";
const char *aclGetRecentErrMsg(void) { return stub_cann_error; }

/* STUB_CANN_FAULT=aclrtSetDevice=507033,HcclAllReduce:4=9: what a function is to return instead of working, from the
 * fourth call on here. So torch_npu says itself what it says of a device that is busy or lost. */
int stub_cann_fault(const char *function, unsigned *calls)
{
    const char *wanted = getenv("STUB_CANN_FAULT");
    size_t length = strlen(function);
    ++*calls;
    for (; wanted && *wanted; wanted = strchr(wanted, ',') ? strchr(wanted, ',') + 1 : "") {
        const char *rest = wanted + length;
        if (strncmp(wanted, function, length) || (*rest != '=' && *rest != ':')) continue;
        unsigned long first = *rest == ':' ? strtoul(rest + 1, (char **)&rest, 10) : 1;
        if (*calls >= first) return atoi(rest + 1);
    }
    return 0;
}

#define MAY_FAIL                                         \
    do {                                                 \
        static unsigned calls;                           \
        int fault = stub_cann_fault(__func__, &calls);   \
        if (fault) return fault;                         \
    } while (0)

/* torch.npu does not initialise without a device. Its name selects the features that torch_npu turns on. */
aclError aclrtGetDeviceCount(uint32_t *count)
{
    const char *wanted = getenv("STUB_CANN_DEVICES");
    *count = wanted ? (uint32_t)atoi(wanted) : 1;
    return 0;
}

static __thread int32_t current_device = -1;

aclError aclrtSetDevice(int32_t device)
{
    MAY_FAIL;
    current_device = device;
    return 0;
}

aclError aclrtGetDevice(int32_t *device)
{
    if (current_device < 0) return 107002; /* no context yet */
    *device = current_device;
    return 0;
}

const char *aclrtGetSocName(void) { return "Ascend910B2"; }

aclError aclrtGetMemInfo(int kind, size_t *free, size_t *total)
{
    (void)kind;
    *free = *total = (size_t)64 << 30; /* that of an Ascend910B2 */
    return 0;
}

/* A kernel of CANN: nothing here runs one, and nothing must pretend to. But for two, by which torch_npu's process group
 * makes and lengthens its buffers without asking PyTorch. */
typedef struct {
    void *data;
    size_t size;
} Buffer;

Buffer *aclCreateDataBuffer(void *data, size_t size)
{
    Buffer *buffer = malloc(sizeof *buffer);
    *buffer = (Buffer){data, size};
    return buffer;
}

aclError aclDestroyDataBuffer(Buffer *buffer) { free(buffer); return 0; }

/* Inputs: dimensions, value. */
static aclError fill(Buffer *const *inputs, Buffer *out)
{
    for (size_t at = 0; at + inputs[1]->size <= out->size; at += inputs[1]->size) {
        memcpy((char *)out->data + at, inputs[1]->data, inputs[1]->size);
    }
    return 0;
}

/* Inputs: data, pairs of int32 by dimension, value. Only for zeros behind the last dimension. */
static aclError pad(Buffer *const *inputs, Buffer *out)
{
    size_t num = inputs[1]->size / sizeof(int32_t), added = out->size - inputs[0]->size;
    const int32_t *paddings = inputs[1]->data;
    for (size_t i = 0; i + 1 < num; i++) {
        if (paddings[i]) return 500001;
    }
    size_t rows = added / ((size_t)paddings[num - 1] * inputs[2]->size), width = inputs[0]->size / rows;
    memset(out->data, 0, out->size);
    for (size_t row = 0; row < rows; row++) {
        memcpy((char *)out->data + row * (out->size / rows), (char *)inputs[0]->data + row * width, width);
    }
    return 0;
}

aclError aclopCompileAndExecute(const char *name, int num_inputs, void *const *input_descriptions, Buffer *const *inputs,
                                int num_outputs, void *const *output_descriptions, Buffer *const *outputs)
{
    (void)input_descriptions, (void)output_descriptions;
    if (!strcmp(name, "Fill") && num_inputs == 2 && num_outputs == 1 && inputs[1]->size) return fill(inputs, *outputs);
    if (!strcmp(name, "PadV3") && num_inputs == 3 && outputs[0]->size > inputs[0]->size) return pad(inputs, *outputs);
    strcpy(stub_cann_error, "the stub of CANN has no kernel ");
    strncat(stub_cann_error, name, 200);
    return 500001; /* ACL_ERROR_GE_FAILURE */
}

/* A NULL stream counts as a failure. Autograd asks for the current stream, even under a fake mode. */
static aclError allocate(void **pointer, size_t size) { return (*pointer = calloc(1, size)) ? 0 : 207001; }

aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    (void)priority, (void)flag;
    return allocate(stream, 1);
}

aclError aclrtCreateStream(void **stream) { return allocate(stream, 1); }
aclError aclrtDestroyStream(void *stream) { free(stream); return 0; }
aclError aclrtDestroyStreamForce(void *stream) { free(stream); return 0; }
aclError aclrtStreamQuery(void *stream, int *status) { (void)stream; *status = 0; return 0; }
aclError aclrtStreamGetId(void *stream, int32_t *id) { *id = (int32_t)(uintptr_t)stream; return 0; }

/* An event is the time at which it was recorded. */
aclError aclrtCreateEventWithFlag(void **event, uint32_t flag)
{
    (void)flag;
    return allocate(event, sizeof(struct timespec));
}

aclError aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }
aclError aclrtDestroyEvent(void *event) { free(event); return 0; }
aclError aclrtQueryEventStatus(void *event, int *status) { (void)event; *status = 1; return 0; }
aclError aclrtQueryEventWaitStatus(void *event, int *status) { (void)event; *status = 0; return 0; }

aclError aclrtRecordEvent(void *event, void *stream)
{
    (void)stream;
    return clock_gettime(CLOCK_MONOTONIC, event);
}

aclError aclrtEventElapsedTime(float *milliseconds, const struct timespec *start, const struct timespec *end)
{
    *milliseconds = (float)((double)(end->tv_sec - start->tv_sec) * 1e3 + (double)(end->tv_nsec - start->tv_nsec) / 1e6);
    return 0;
}

aclError aclrtMalloc(void **pointer, size_t size, int policy)
{
    MAY_FAIL;
    (void)policy;
    return allocate(pointer, size);
}

aclError aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }
aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
aclError aclrtFree(void *pointer) { free(pointer); return 0; }
aclError aclrtFreeHost(void *pointer) { free(pointer); return 0; }

/* Expandable segments: addresses first, memory for parts of them later. */
aclError aclrtReserveMemAddress(void **address, size_t size)
{
    /* Its length is kept in a page before it: it is not given when the addresses are given back. */
    size_t *start = mmap(NULL, size + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || mprotect(start, 4096, PROT_READ | PROT_WRITE)) return 207001;
    *start = size + 4096;
    *address = (char *)start + 4096;
    return 0;
}

aclError aclrtReleaseMemAddress(void *address)
{
    size_t *start = (size_t *)((char *)address - 4096);
    return munmap(start, *start);
}

aclError aclrtMallocPhysical(void **handle, size_t size)
{
    MAY_FAIL;
    (void)size;
    return allocate(handle, 1);
}

aclError aclrtFreePhysical(void *handle) { free(handle); return 0; }

aclError aclrtMapMem(void *address, size_t size, size_t offset, void *handle)
{
    MAY_FAIL;
    (void)offset, (void)handle;
    return mprotect(address, size, PROT_READ | PROT_WRITE);
}

aclError aclrtMemset(void *pointer, size_t room, int32_t value, size_t size)
{
    if (size > room) return 1;
    memset(pointer, value, size);
    return 0;
}

aclError aclrtMemsetAsync(void *pointer, size_t room, int32_t value, size_t size)
{
    return aclrtMemset(pointer, room, value, size);
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind)
{
    (void)kind;
    if (size > room) return 1;
    memmove(to, from, size);
    return 0;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream)
{
    MAY_FAIL;
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}

/* Initialisation reads the default of jit_compile, and rejects an empty one. */
static const char JIT_COMPILE[] = "disable";
size_t aclGetCompileoptSize(int option) { (void)option; return sizeof JIT_COMPILE; }

aclError aclGetCompileopt(int option, char *value, size_t length)
{
    (void)option;
    strncpy(value, JIT_COMPILE, length);
    return 0;
}

/* It also reads whether kernels are to be deterministic. */
aclError aclrtGetSysParamOpt(int option, int64_t *value) { (void)option; *value = 0; return 0; }

/* Looked up by dlsym when first called, so torch_npu has no undefined symbols that would tell stubs.py of them. */
aclError aclSetCompileopt(void) { return 0; }
aclError aclrtCtxSetSysParamOpt(void) { return 0; }
aclError aclrtSetDeviceSatMode(void) { return 0; }
aclError aclrtSetOpExecuteTimeOut(void) { return 0; }
aclError aclrtSynchronizeDevice(void)
{
    MAY_FAIL;
    return 0;
}

aclError aclrtSynchronizeDeviceWithTimeout(void)
{
    MAY_FAIL;
    return 0;
}

aclError aclrtSynchronizeStreamWithTimeout(void)
{
    MAY_FAIL;
    return 0;
}

aclError aclrtSetOpWaitTimeout(void) { return 0; }
