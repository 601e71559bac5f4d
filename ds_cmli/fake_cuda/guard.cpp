// What PyTorch's C++ asks of a device of type CUDA, put in the place of what the process has, and back:
// the guard, by which autograd and the generic code of operators find the current device and stream,
// and the hooks, by which they find that there is a device.
#include <utility>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

using c10::DeviceType;

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

// PyTorch makes its hooks once and keeps the object: what it does is its table of functions, which
// is the first word of it.
const void*& functions(const at::CUDAHooksInterface& hooks) {
  return *reinterpret_cast<const void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

auto& guard_place = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
const c10::impl::DeviceGuardImplInterface* guard_before = nullptr;
const void* functions_before = nullptr;

}  // namespace

extern "C" void fake_cuda_on() {
  static const c10::impl::FakeGuardImpl<DeviceType::CUDA> guard;
  static const Hooks hooks;
  guard_before = guard_place.exchange(&guard);
  functions_before = std::exchange(functions(at::detail::getCUDAHooks()), functions(hooks));
}

extern "C" void fake_cuda_off() {
  guard_place = guard_before;
  functions(at::detail::getCUDAHooks()) = functions_before;
}
