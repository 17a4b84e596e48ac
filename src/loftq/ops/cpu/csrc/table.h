// The table of functions of one instruction set; included last.
#pragma once

namespace {

constexpr Kernels KERNELS = {Isa::lanes,     product_scratch, prepare,   product_any, dot,
                             attend,         dequantize_any,  fit_any,   round_any,   pack};

}  // namespace
