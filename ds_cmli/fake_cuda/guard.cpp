// What PyTorch asks of a device of type CUDA, whatever its tensors hold: the guard, by which autograd
// and the generic code of operators find the current device and stream, and the hooks, by which it
// finds a generator. Put in the place of those that the process has, and back.
#include <cstring>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using c10::impl::DeviceGuardImplInterface;

const Device ONLY(DeviceType::CUDA, 0);

struct Guard final : DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Device exchangeDevice(Device) const override { return ONLY; }
  Device getDevice() const override { return ONLY; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, ONLY); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

struct Random final : at::CPUGeneratorImpl {
  Random() { device_ = ONLY; }
};

struct Hooks final : at::CUDAHooksInterface {
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

// PyTorch makes its hooks once and keeps the object: what it does is its table of functions, which
// is the first word of it.
void* exchange_functions(void* functions) {
  void* object = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  void* before;
  std::memcpy(&before, object, sizeof before);
  std::memcpy(object, &functions, sizeof functions);
  return before;
}

const DeviceGuardImplInterface* guard_before = nullptr;
void* functions_before = nullptr;

}  // namespace

extern "C" void fake_cuda_on() {
  static const Guard guard;
  static const Hooks hooks;
  void* functions;
  std::memcpy(&functions, static_cast<const void*>(&hooks), sizeof functions);
  auto& place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  guard_before = place.exchange(&guard);
  functions_before = exchange_functions(functions);
}

extern "C" void fake_cuda_off() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)] = guard_before;
  exchange_functions(functions_before);
}
