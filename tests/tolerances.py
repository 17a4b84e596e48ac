"""Every tolerance of the tests, with its reason: `from tolerances import FLOAT32_ROUNDING`.

Codes, packed bytes and files are compared exactly and need none. A test that wants a number of its
own adds it here; a failing test is never a reason to raise one.
"""

# One value by two float32 orders of summation, relative to the largest element: four units in the
# last place (2^-23 = 1.2e-7 each).
FLOAT32_ROUNDING = 5e-7

# A float32 solve of up to a few thousand rows against a float64 one, relative.
FLOAT32_SOLVE = 1e-5

# Two float64 routes to one closed form, relative.
FLOAT64_SOLVE = 1e-10

# The error in a layer's record against the error recomputed from the files, relative: the same
# float32 tensors, in another order of summation.
RECORD_ERROR = 1e-6

# Logits of a tiny float32 model before and after merge, unmerge or reload, absolute. Merging adds
# B A to Q before the product with x instead of after it; stock PEFT layers differ by 2.5e-7.
MERGE_LOGITS = 1e-6

# Logits of up to 3 from a step of the CPU library, against transformers' float32 forward: sums in
# another order through two blocks.
STEP_LOGITS = 1e-5

# A kernel's relative RMS error against float64, as a multiple of plain PyTorch's in its dtype.
KERNEL_ERROR_RATIO = 2.0

# Excess of the Chebyshev solver's final objective over the exact SVD's, relative, at T = 5.
CHEBYSHEV_EXCESS = 5e-4

# Noted tables of weight error on Gaussian matrices, relative: other draws of the same distribution.
GAUSSIAN_TABLE = 1e-2

# Perplexity of SmolLM2-135M in float32 on all WikiText-2 test windows, absolute: a wrong token
# stream or protocol moves it by more than this, another BLAS by less.
REFERENCE_PERPLEXITY = 0.1

# Spearman correlation on STS-B, in points of 100, absolute: another BLAS may swap near ties.
SPEARMAN_POINTS = 0.3

# Logits of a tiny float32 model in another engine's float32 code, relative to the largest: the
# weights are the same bits, the products are summed in another order, two blocks deep.
ENGINE_LOGITS = 1e-5

# Logits of a tiny random model in llama.cpp, relative RMS: it rounds the inputs of each packed
# layer to 8 bits in blocks of 32, which moves random two-block models by 1 to 4 %.
LLAMA_CPP_INPUTS = 0.08
