// Parallel regions: on the threads of the OpenMP runtime that PyTorch has loaded, or on a pool of std::threads.
//
// After a parallel region OpenMP's threads spin for some milliseconds before they sleep. Own threads would have to
// share the cores with them when a backward pass has just ended, which is when an optimizer steps. The extension is
// built without OpenMP, so that it cannot load a second runtime.
#pragma once

#include <cstdint>
#include <functional>

namespace ltp {

// Makes later regions run by the function at this address, GOMP_parallel of PyTorch's OpenMP runtime, or by
// std::threads if it is 0. A forked child always uses std::threads: OpenMP's threads do not exist there, and it would
// wait for ever.
void use_openmp(uintptr_t gomp_parallel);

// Runs body(worker) once on each of `threads` threads, worker = 0 (the caller) .. threads - 1, and waits for all.
// Fewer run if the system starts no more, so that the body must take its work from a shared queue. The body sees the
// default floating-point environment: round to nearest, denormals kept. It must not throw.
void run_parallel(int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace ltp
