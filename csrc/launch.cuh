// The host side of a kernel, one source for both builds: launch configurations, tensor maps, device questions.
//
// A launcher is an `extern "C" int name(..., Stream stream)`; it returns 0, a negative CUDA error, or in the emulated
// build the positive number of reports (read with tokenmill_emulator_reports).
#pragma once
#include "ptx.cuh"

#ifdef TOKENMILL_EMULATED
#include "emulator/host.h"
typedef void* Stream;
#else
typedef cudaStream_t Stream;
#endif

struct LaunchConfig {
    dim3 grid, block;
    size_t dynamic_smem = 0;     // bytes
    Stream stream = nullptr;
    dim3 cluster = dim3(1, 1, 1);
    bool cooperative = false;    // all CTAs resident at once, or the launch fails
    bool dependent = false;      // may start before the grid before it has ended (programmatic dependent launch)
};

// Element types of tensor maps; 8-bit formats of any meaning are u8.
enum class TensorType : u32 { u8, f16, bf16, f32, s32 };
constexpr u32 tensor_type_bytes(TensorType type) {
    return type == TensorType::u8 ? 1 : type == TensorType::f16 || type == TensorType::bf16 ? 2 : 4;
}

// A tiled tensor map (cuTensorMapEncodeTiled): innermost dimension first.
struct TensorMapShape {
    const void* base;            // 16-byte aligned
    TensorType type;
    int rank;                    // 1 to 5
    u64 size[5];                 // elements
    u64 stride_bytes[5];         // of dimensions 1.. ; multiples of 16; [0] is ignored (elements are dense)
    u32 box[5];                  // elements, at most 256; the innermost a multiple of 16 bytes, within the swizzle's width
    Swizzle swizzle = Swizzle::none;
    bool nan_fill = false;       // out-of-bounds elements of float types read as NaN instead of zero
};

#ifdef TOKENMILL_EMULATED

// Launches the kernel; 0, a negative CUDA error, or the number of reports.
template <class... P, class... A>
int launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
    emulator::Grid grid{config.grid, config.block, config.cluster, config.dynamic_smem, config.cooperative,
                        config.dependent};
    return emulator::launch(kernel, grid, static_cast<A&&>(arguments)...);
}

// Fills *map; 0 or a negative CUDA error.
inline int make_tensor_map(CUtensorMap* map, const TensorMapShape& shape) {
    return emulator::make_tensor_map(map, shape.base, (u32)shape.type, tensor_type_bytes(shape.type), shape.rank,
                                     shape.size, shape.stride_bytes, shape.box, (u32)shape.swizzle, shape.nan_fill);
}

// Streaming multiprocessors of the device, and the most shared memory that one CTA may use.
inline int device_sm_count() { return emulator::config.sm_count; }
inline int device_smem_per_cta() { return emulator::smem_per_cta; }

#else

template <class... P, class... A>
int launch(void (*kernel)(P...), const LaunchConfig& config, A&&... arguments) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamic_smem);
    if (error != cudaSuccess) return -(int)error;
    cudaLaunchAttribute attributes[3];
    unsigned count = 0;
    const unsigned ctas = config.cluster.x * config.cluster.y * config.cluster.z;
    if (ctas > 8) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error != cudaSuccess) return -(int)error;
    }
    if (ctas > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = config.cluster.x;
        attributes[count].val.clusterDim.y = config.cluster.y;
        attributes[count++].val.clusterDim.z = config.cluster.z;
    }
    if (config.cooperative) {
        attributes[count].id = cudaLaunchAttributeCooperative;
        attributes[count++].val.cooperative = 1;
    }
    if (config.dependent) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.dynamic_smem;
    launch_config.stream = config.stream;
    launch_config.attrs = attributes;
    launch_config.numAttrs = count;
    return -(int)cudaLaunchKernelEx(&launch_config, kernel, static_cast<P>(arguments)...);
}

// The driver's entry point is looked up at run time, so that nothing links against libcuda.
inline int make_tensor_map(CUtensorMap* map, const TensorMapShape& shape) {
    static void* encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess) return -(int)error;
    }
    static const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                                CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                                                CU_TENSOR_MAP_DATA_TYPE_INT32};
    cuuint64_t size[5], strides[5];
    cuuint32_t box[5], element_strides[5];
    for (int i = 0; i < shape.rank; i++) {
        size[i] = shape.size[i];
        box[i] = shape.box[i];
        element_strides[i] = 1;
        if (i) strides[i - 1] = shape.stride_bytes[i];
    }
    return -(int)reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        map, types[(u32)shape.type], shape.rank, const_cast<void*>(shape.base), size, strides, box, element_strides,
        CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)shape.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        shape.nan_fill ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}
inline int device_sm_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int device_smem_per_cta() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

#endif

// A matrix of `rows` rows of `columns` elements, `row_bytes` apart, in boxes of box_rows x box_columns.
inline int make_tensor_map_2d(CUtensorMap* map, const void* base, TensorType type, u64 columns, u64 rows,
                              u64 row_bytes, u32 box_columns, u32 box_rows, Swizzle swizzle) {
    return make_tensor_map(
        map, TensorMapShape{base, type, 2, {columns, rows}, {0, row_bytes}, {box_columns, box_rows}, swizzle});
}
