// An emulated GPU for torch's CPU build: a device "cuda" in the host's memory, and for cuda.core a driver without hardware.
//
// Every operation on its tensors goes to the dispatcher's fallback, which emulated_gpu.py implements; this file has the tensors themselves. Each
// allocation is at the end of its pages, between two inaccessible ones, and is NaN at first. Launches call the function given to emulated_gpu_run.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <mutex>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const c10::Device GPU(c10::kCUDA, 0);
constexpr size_t PAGE = 4096;

// ---- memory ------------------------------------------------------------------------------------------------------------------------------

std::mutex mutex;
std::map<uintptr_t, size_t> allocated;  // what kernels may read and write

struct Block {
  char *pages, *begin;
  size_t bytes;
};

void release(void* context) {
  auto block = static_cast<Block*>(context);
  std::lock_guard<std::mutex> lock(mutex);
  allocated.erase(reinterpret_cast<uintptr_t>(block->begin));
  munmap(block->pages, block->bytes);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, GPU};
    size_t used = (bytes + 511) / 512 * 512, open = (used + PAGE - 1) / PAGE * PAGE, all = open + 2 * PAGE;
    auto pages = static_cast<char*>(mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK(pages != MAP_FAILED && mprotect(pages + PAGE, open, PROT_READ | PROT_WRITE) == 0, "no memory for ", bytes, " bytes");
    char* begin = pages + PAGE + open - used;
    std::memset(begin, 0xff, used);
    std::lock_guard<std::mutex> lock(mutex);
    allocated[reinterpret_cast<uintptr_t>(begin)] = bytes;
    return {begin, new Block{pages, begin, all}, release, GPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(c10::kCUDA, &memory);

// ---- the device ----------------------------------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void synchronizeStream(const c10::Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
};

// torch has already created its hooks object and keeps it. It has no data, so copying our object's vtable pointer over its own turns it into ours.
bool hooked = [] {
  static Hooks ours;
  void* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(theirs, static_cast<void*>(&ours), sizeof(void*));
  return true;
}();

// ---- tensors -------------------------------------------------------------------------------------------------------------------------------

at::Tensor shaped(at::Tensor made, const at::Tensor& like) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  return made;
}

at::Tensor tensor(const at::Tensor& like, c10::Storage storage, c10::DispatchKeySet keys) {
  return shaped(at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), keys, like.dtype()), like);
}

c10::Storage storage_of(c10::DataPtr data, size_t bytes) { return {c10::Storage::use_byte_size_t(), bytes, std::move(data), nullptr, false}; }

// A CPU tensor over the same memory.
at::Tensor on_cpu(const at::Tensor& gpu) {
  auto kept = new c10::Storage(gpu.storage());
  c10::DataPtr data(kept->mutable_data(), kept, [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
  return tensor(gpu, storage_of(std::move(data), kept->nbytes()), c10::DispatchKeySet(c10::DispatchKey::CPU));
}

// A copy of a CPU tensor on the GPU.
at::Tensor on_gpu(const at::Tensor& cpu) {
  size_t bytes = cpu.storage().nbytes();
  auto data = memory.allocate(bytes);
  if (bytes) std::memcpy(data.get(), cpu.storage().data(), bytes);
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);  // the tensor also gets autograd's keys, as one that is not a view
  return shaped(at::detail::make_tensor<c10::TensorImpl>(storage_of(std::move(data), bytes), keys, cpu.dtype()), cpu);
}

// The GPU tensor for a CPU tensor that is a view of the GPU tensor `gpu`'s memory.
at::Tensor view(const at::Tensor& gpu, const at::Tensor& cpu) { return tensor(cpu, gpu.storage(), gpu.key_set()); }

// Gives a GPU tensor the storage and the shape of another.
void become(const at::Tensor& gpu, const at::Tensor& other) {
  gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(other.storage());
  shaped(gpu, other);
}

TORCH_LIBRARY(emulated_gpu, library) {
  library.def("on_cpu", on_cpu);
  library.def("on_gpu", on_gpu);
  library.def("view", view);
  library.def("become", become);
}

// ---- the driver --------------------------------------------------------------------------------------------------------------------------------

enum Result { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500, COOPERATIVE_LAUNCH_TOO_LARGE = 720 };
enum DeviceAttribute { WARP = 10, MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, COOPERATIVE_LAUNCH = 95, SHARED_OPTIN = 97 };
constexpr int FUNCTION_SHARED = 8, FUNCTION_THREADS = 0, COOPERATIVE = 2;
constexpr unsigned SHARED = 232448, SHARED_UNASKED = 49152, MULTIPROCESSOR_COUNT = 3;

struct Kernel {
  const char *code, *name;
  unsigned shared;
};
struct Attribute {  // CUlaunchAttribute
  int id, padding;
  union {
    int cooperative;
    char bytes[64];
  };
};
struct Config {  // CUlaunchConfig
  unsigned dims[6], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};
using Run = int (*)(const char* code, const char* name, const unsigned* dims, unsigned shared, void* stream, int cooperative, void** parameters);
Run run = nullptr;
thread_local void* context = nullptr;

unsigned blocks_at_once(size_t shared) { return (SHARED + 1024) / (shared + 1024); }  // per multiprocessor, if shared memory is the only limit

int launch(const Kernel& kernel, const unsigned* dims, unsigned shared, void* stream, bool cooperative, void** parameters) {
  if (!context) return INVALID_CONTEXT;
  for (int i = 0; i < 6; ++i)
    if (dims[i] == 0 || ((i == 1 || i == 2) && dims[i] > 65535)) return INVALID_VALUE;
  if (shared > kernel.shared || dims[3] * dims[4] * dims[5] > 1024) return INVALID_VALUE;
  if (cooperative && dims[0] * dims[1] * dims[2] > MULTIPROCESSOR_COUNT * blocks_at_once(shared)) return COOPERATIVE_LAUNCH_TOO_LARGE;
  return run(kernel.code, kernel.name, dims, shared, stream, cooperative, parameters);
}

}  // namespace

EXPORT void emulated_gpu_run(Run function) { run = function; }

// Writes the begin and end of up to `room` allocations; returns how many there are.
EXPORT size_t emulated_gpu_allocated(uintptr_t (*found)[2], size_t room) {
  std::lock_guard<std::mutex> lock(mutex);
  size_t i = 0;
  for (auto [begin, bytes] : allocated)
    if (i < room) found[i][0] = begin, found[i++][1] = begin + bytes;
  return allocated.size();
}

EXPORT int cuInit(unsigned) { return SUCCESS; }
EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
EXPORT int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
EXPORT int cuDeviceGet(int* device, int) { return *device = 0, SUCCESS; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> known = {{WARP, 32},  {MULTIPROCESSORS, MULTIPROCESSOR_COUNT}, {MAJOR, 9},
                                    {MINOR, 0}, {COOPERATIVE_LAUNCH, 1}, {SHARED_OPTIN, SHARED}};
  auto found = known.find(attribute);
  return *value = found == known.end() ? 0 : found->second, SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(void** found, int) { return *found = &context, SUCCESS; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
EXPORT int cuCtxGetCurrent(void** found) { return *found = context, SUCCESS; }
EXPORT int cuCtxSetCurrent(void* given) { return context = given, SUCCESS; }
EXPORT int cuCtxGetDevice(int* device) { return *device = 0, context ? SUCCESS : INVALID_CONTEXT; }
EXPORT int cuStreamGetCtx(void*, void** found) { return *found = &context, SUCCESS; }
EXPORT int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  return *library = strdup(static_cast<const char*>(code)), SUCCESS;
}
EXPORT int cuLibraryUnload(void*) { return SUCCESS; }
EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  return *kernel = new Kernel{static_cast<char*>(library), strdup(name), SHARED_UNASKED}, SUCCESS;
}
EXPORT int cuKernelGetAttribute(int* value, int attribute, void*, int) { return *value = attribute == FUNCTION_THREADS ? 1024 : 0, SUCCESS; }
EXPORT int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  if (attribute != FUNCTION_SHARED || value < 0 || unsigned(value) > SHARED) return INVALID_VALUE;
  return static_cast<Kernel*>(kernel)->shared = std::max(unsigned(value), SHARED_UNASKED), SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t shared) { return *blocks = blocks_at_once(shared), SUCCESS; }
EXPORT int cuLaunchKernelEx(const Config* config, void* kernel, void** parameters, void**) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->count; ++i)
    if (config->attributes[i].id == COOPERATIVE) cooperative = config->attributes[i].cooperative;
  return launch(*static_cast<Kernel*>(kernel), config->dims, config->shared, config->stream, cooperative, parameters);
}
EXPORT int cuLaunchKernel(void* kernel, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned shared, void* stream,
                          void** parameters, void**) {
  const unsigned dims[6] = {a, b, c, d, e, f};
  return launch(*static_cast<Kernel*>(kernel), dims, shared, stream, false, parameters);
}
EXPORT int cuPointerGetAttribute(void* value, int attribute, uintptr_t pointer) {
  enum { MEMORY_TYPE = 2, DEVICE_POINTER = 3, HOST_POINTER = 4, MANAGED = 8, DEVICE = 9, A_DEVICES = 2 };
  if (attribute == MEMORY_TYPE) return *static_cast<unsigned*>(value) = A_DEVICES, SUCCESS;
  if (attribute == MANAGED || attribute == DEVICE) return *static_cast<int*>(value) = 0, SUCCESS;
  if (attribute == DEVICE_POINTER || attribute == HOST_POINTER) return *static_cast<uintptr_t*>(value) = pointer, SUCCESS;
  return INVALID_VALUE;
}
EXPORT int cuPointerGetAttributes(unsigned count, const int* attributes, void** values, uintptr_t pointer) {
  for (unsigned i = 0; i < count; ++i)
    if (int error = cuPointerGetAttribute(values[i], attributes[i], pointer)) return error;
  return SUCCESS;
}
EXPORT int cuGetErrorName(int, const char** name) { return *name = "an emulated GPU's", SUCCESS; }
EXPORT int cuGetErrorString(int, const char** words) { return *words = "an emulated GPU's", SUCCESS; }

// Writes a Map of sm90.cuh; refuses what the driver would refuse.
EXPORT int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                                  const unsigned* box, const unsigned* steps, int interleave, int swizzle, int, int fill) {
  const int UINT16 = 1, SWIZZLE_128B = 3;
  const uint64_t MARK = 0x54656E736F724D61;
  if (type != UINT16 || rank != 4 || interleave || swizzle != SWIZZLE_128B || fill || uintptr_t(address) % 16 || 2 * box[0] > 128) return INVALID_VALUE;
  for (int i = 0; i < 4; ++i)
    if (sizes[i] == 0 || sizes[i] > uint64_t(1) << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return INVALID_VALUE;
  for (int i = 0; i < 3; ++i)
    if (strides[i] % 16 || strides[i] >= uint64_t(1) << 40) return INVALID_VALUE;
  uint64_t words[16] = {uint64_t(address), sizes[0], sizes[1], sizes[2], sizes[3], strides[0], strides[1], strides[2], box[0], box[1], box[2], box[3]};
  words[15] = MARK;
  return std::memcpy(map, words, sizeof words), SUCCESS;
}

EXPORT int cuGetProcAddress_v2(const char* symbol, void** found, int, uint64_t, int* status) {
  static void* self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(cuInit), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  std::string name = symbol;
  *found = dlsym(self, name.c_str());
  if (!*found) *found = dlsym(self, (name + "_v2").c_str());
  if (status) *status = *found ? 0 : 1;
  return *found ? SUCCESS : NOT_FOUND;
}
EXPORT int cuGetProcAddress(const char* symbol, void** found, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, found, version, flags, nullptr);
}
