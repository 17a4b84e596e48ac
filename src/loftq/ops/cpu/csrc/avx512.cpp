#include "numbers.h"
#include "isa_avx512.h"
#include "product.h"
#include "attend.h"
#include "dequantize.h"
#include "rounding.h"
#include "table.h"

const Kernels* avx512_kernels() { return &KERNELS; }
