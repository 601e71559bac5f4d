// A CUDA device that has no memory and does nothing, also where a build of PyTorch with CUDA has
// one of its own. Autograd and the generic code of operators ask for a device's guard and hooks
// even where tensors hold no data, and DDP for a timer.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device ONLY(DeviceType::CUDA, 0);

}  // namespace

// Autograd runs each operator's backward on the stream of its forward, and lets streams wait for
// each other. streams.py hears of it by these functions.
extern "C" {
int64_t fits_stream = 0;  // the current one
void (*fits_switched)(int64_t stream) = nullptr;
int64_t (*fits_recorded)(int64_t stream) = nullptr;  // returns the event
void (*fits_waited)(int64_t stream, int64_t event) = nullptr;
void (*fits_used)(const void* storage, int64_t stream) = nullptr;
}

namespace {

Stream stream_of(int64_t number) {
  return Stream(Stream::UNSAFE, ONLY, number);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Device exchangeDevice(Device) const override { return ONLY; }
  Device getDevice() const override { return ONLY; }
  Stream getStream(Device) const noexcept override { return stream_of(fits_stream); }
  Stream exchangeStream(Stream stream) const noexcept override {
    const Stream before = stream_of(fits_stream);
    if (stream != before && fits_switched) {
      fits_stream = stream.id();
      fits_switched(fits_stream);
    }
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    if (fits_recorded) *event = reinterpret_cast<void*>(fits_recorded(stream.id()));
  }
  void block(void* event, const Stream& stream) const override {
    if (fits_waited) fits_waited(stream.id(), reinterpret_cast<int64_t>(event));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    // The data's place within its storage is that of any other storage's.
    static const c10::Storage any(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, ONLY));
    const auto storage = reinterpret_cast<const char*>(any.unsafeGetStorageImpl());
    const auto offset = reinterpret_cast<const char*>(&any.data_ptr()) - storage;
    if (fits_used) fits_used(reinterpret_cast<const char*>(&data) - offset, stream.id());
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

struct Random final : at::CPUGeneratorImpl {
  Random() { device_ = ONLY; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  std::string showConfig() const override { return ""; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<Random>(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator only = at::make_generator<Random>();
    return only;
  }
};

// PyTorch chooses the hooks at their first use: before a build with CUDA registers its own.
const bool chosen = [] {
  const auto ours = [](at::CUDAHooksArgs args) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<Hooks>(args);
  };
  at::CUDAHooksRegistry()->Register("CUDAHooks", ours, c10::REGISTRY_FALLBACK);
  return at::detail::getCUDAHooks().isBuilt();
}();

}  // namespace

// Registers the guard, and no timer, in place of those of a build with CUDA, loaded by now.
extern "C" void fits_register() {
  static Guard guard;
  c10::impl::DeviceGuardImplRegistrar(DeviceType::CUDA, &guard);
  const auto none = [](Device) { return std::unique_ptr<c10d::Timer>(); };
  c10d::TimerRegistry()->Register(DeviceType::CUDA, none, c10::REGISTRY_PREFERRED);
}
