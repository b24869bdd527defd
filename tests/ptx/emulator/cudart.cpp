// The functions of the CUDA runtime that the kernels' launchers call, for the emulator: linked into _C_cuda in the
// place of libcudart. One that is missing here is an error of the linker.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

struct Kernel;

extern "C" {
const char* ptx_error();
Kernel* ptx_kernel(int module, const char* name);
int ptx_launch(Kernel* kernel, const unsigned* grid, const unsigned* block, unsigned dynamic_shared,
               const void* const* values);
int ptx_opt_in(Kernel* kernel, int bytes);
int ptx_attribute_processors();
int ptx_attribute_shared();
int ptx_attribute_sm();
}

namespace {

std::map<const void*, std::string>& names() {  // of kernels, by the address of their host functions
    static std::map<const void*, std::string> all;
    return all;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
} configuration;

cudaError_t last = cudaSuccess;

cudaError_t failed(cudaError_t status) { return last = status; }

Kernel* kernel_at(const void* host) {
    const auto name = names().find(host);
    return name == names().end() ? nullptr : ptx_kernel(-1, name->second.c_str());
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    names()[host] = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** values, size_t shared, cudaStream_t) {
    Kernel* const kernel = kernel_at(host);
    if (kernel == nullptr) return failed(cudaErrorInvalidDeviceFunction);
    const int status = ptx_launch(kernel, &grid.x, &block.x, unsigned(shared), values);
    return status == 0 ? cudaSuccess : failed(cudaErrorLaunchFailure);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** values, size_t shared,
                               cudaStream_t on) {
    return cudaLaunchKernel(kernel, grid, block, values, shared, on);
}

cudaError_t cudaGetLastError() {
    const cudaError_t status = last;
    last = cudaSuccess;
    return status;
}

const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorLaunchFailure ? ptx_error() : "the emulated device refuses";
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = ptx_attribute_processors();
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = ptx_attribute_shared();
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = ptx_attribute_sm() / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = ptx_attribute_sm() % 10;
            return cudaSuccess;
        default:
            return failed(cudaErrorInvalidValue);
    }
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    Kernel* const kernel = kernel_at(host);
    if (kernel == nullptr) return failed(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    return ptx_opt_in(kernel, value) == 0 ? cudaSuccess : failed(cudaErrorInvalidValue);
}

}  // extern "C"
