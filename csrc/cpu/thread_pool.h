// Parallel regions: on the threads of the OpenMP runtime that PyTorch has loaded, or on a pool of std::threads.
//
// After a parallel region OpenMP's threads spin for some milliseconds before they sleep. Threads of our own would have
// to share the cores with them whenever a backward pass has just ended, which is when an optimizer steps. The extension
// itself is built without OpenMP, so it can bring no second runtime.
#pragma once

#include <cstdint>
#include <functional>

namespace ltp {

// Has later regions run by the function at this address, GOMP_parallel of PyTorch's OpenMP runtime; 0: by std::threads.
// A forked child always uses std::threads, as OpenMP's are gone there and waited for in vain.
void use_openmp(uintptr_t gomp_parallel);

// Runs body(worker) once on each of `threads` threads, worker = 0 (the caller) .. threads - 1, and waits for all.
// Fewer run if the system refuses to start more, so the body must take its work from a shared queue. The body sees the
// default floating-point environment: round to nearest, denormals kept. It must not throw.
void run_parallel(int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace ltp
