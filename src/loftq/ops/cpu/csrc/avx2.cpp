#include "numbers.h"
#include "isa_avx2.h"
#include "product.h"
#include "attend.h"
#include "dequantize.h"
#include "rounding.h"
#include "table.h"

const Kernels* avx2_kernels() { return &KERNELS; }
