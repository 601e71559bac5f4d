// In place of NVIDIA's driver and its management library: there is no GPU. The loader gives this
// library, once loaded, to whoever asks for the one whose name it bears (its soname).
extern "C" {
int cuInit(unsigned) { return 100; }   // CUDA_ERROR_NO_DEVICE
int nvmlInit_v2() { return 9; }        // NVML_ERROR_DRIVER_NOT_LOADED
int nvmlInitWithFlags(unsigned) { return 9; }
}
