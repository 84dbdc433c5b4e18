/* The CUDA runtime calls of dwattn.deploy.cuda, in host memory. A graph launches nothing: that is the
 * engine's work, and the fake engine's runs at enqueue. DWATTN_FAKE_CUDA_LIMIT bounds an allocation. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int live = 0;
int graph_launches = 0;
int device_count = 1;

int cudaGetDeviceCount(int* count) { *count = device_count; return device_count ? 0 : 100; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? 8 : 7;
    return 0;
}
int cudaGetDeviceProperties(char* properties, int device) {
    (void)device;
    strcpy(properties, "Fake Orin");
    return 0;
}
int cudaMemGetInfo(size_t* free_bytes, size_t* total) { *free_bytes = 4u << 20; *total = 8u << 20; return 0; }
int cudaSetDeviceFlags(unsigned flags) { return flags == 1 ? 0 : 1; }
int cudaMalloc(void** pointer, size_t size) {
    const char* limit = getenv("DWATTN_FAKE_CUDA_LIMIT");
    if (limit && size > (size_t)atol(limit)) return 2;
    *pointer = malloc(size);
    ++live;
    return 0;
}
int cudaFree(void* pointer) { free(pointer); --live; return 0; }
int cudaMemcpy(void* to, const void* from, size_t size, int kind) {
    memcpy(to, from, size);
    return kind == 1 || kind == 2 ? 0 : 1;
}
static int make(void** handle) { *handle = malloc(sizeof(double)); ++live; return 0; }
static int drop(void* handle) { free(handle); --live; return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return flags == 1 ? make(stream) : 1; }
int cudaStreamDestroy(void* stream) { return drop(stream); }
int cudaStreamSynchronize(void* stream) { return stream ? 0 : 1; }
int cudaEventCreate(void** event) { return make(event); }
int cudaEventDestroy(void* event) { return drop(event); }
int cudaEventRecord(void* event, void* stream) { *(double*)event = now_ms(); return stream ? 0 : 1; }
int cudaEventSynchronize(void* event) { return event ? 0 : 1; }
int cudaEventElapsedTime(float* ms, void* start, void* stop) {
    *ms = (float)(*(double*)stop - *(double*)start) + 0.25f;
    return 0;
}
int cudaStreamBeginCapture(void* stream, int mode) { return stream && mode == 1 ? 0 : 1; }
int cudaStreamEndCapture(void* stream, void** graph) { return stream ? make(graph) : 1; }
int cudaGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags) {
    return graph && flags == 0 ? make(exec) : 1;
}
int cudaGraphDestroy(void* graph) { return drop(graph); }
int cudaGraphExecDestroy(void* exec) { return drop(exec); }
int cudaGraphLaunch(void* exec, void* stream) { ++graph_launches; return exec && stream ? 0 : 1; }
const char* cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "fake error"; }
