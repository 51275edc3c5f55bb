/* What torch_npu needs of CANN, beyond success codes, to initialise where there is no NPU.
 *
 * stubs.py defines the other functions that torch_npu links to: those return 0, ACL_SUCCESS, and write nothing. The
 * signatures are those of torch_npu's include/acl. Arguments that are not used are cast to void, or not declared. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int aclError;

/* torch.npu does not initialise without a device. Its name selects the features that torch_npu turns on. */
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
aclError aclrtGetDevice(int32_t *device) { *device = 0; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B2"; }

aclError aclrtGetMemInfo(int kind, size_t *free, size_t *total)
{
    (void)kind;
    *free = *total = (size_t)64 << 30; /* that of an Ascend910B2 */
    return 0;
}

/* Put into every error message as a C string. */
const char *aclGetRecentErrMsg(void) { return "(this is the stub of CANN, not CANN)"; }

/* A NULL stream counts as a failure. Autograd asks for the current stream, even under a fake mode. */
static aclError allocate(void **pointer, size_t size) { return (*pointer = malloc(size)) ? 0 : 1; }

aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)
{
    (void)priority, (void)flag;
    return allocate(stream, 1);
}

aclError aclrtCreateEventWithFlag(void **event, uint32_t flag)
{
    (void)flag;
    return allocate(event, 1);
}

/* Device memory is host memory: tensors made outside a fake mode are allocated and copied, though not computed. */
aclError aclrtMalloc(void **pointer, size_t size, int policy)
{
    (void)policy;
    return allocate(pointer, size);
}

aclError aclrtMallocHost(void **pointer, size_t size) { return allocate(pointer, size); }
aclError aclrtFree(void *pointer) { free(pointer); return 0; }
aclError aclrtFreeHost(void *pointer) { free(pointer); return 0; }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind)
{
    (void)kind;
    if (size > room) return 1;
    memcpy(to, from, size);
    return 0;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream)
{
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
aclError aclrtDestroyStreamForce(void) { return 0; }
aclError aclrtSetDeviceSatMode(void) { return 0; }
aclError aclrtSetOpExecuteTimeOut(void) { return 0; }
aclError aclrtSynchronizeDeviceWithTimeout(void) { return 0; }
aclError aclrtSynchronizeStreamWithTimeout(void) { return 0; }
