// A CUDA device that has no memory and does nothing, for a build of PyTorch without CUDA. Autograd and the generic code
// of operators ask for a device's guard and hooks even where tensors hold no data.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device ONLY(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return ONLY; }
  Device getDevice() const override { return ONLY; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, ONLY); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, ONLY); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

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

}  // namespace

namespace at {
using NoDevice = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, NoDevice)
}  // namespace at
