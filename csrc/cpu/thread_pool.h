// A small pool of std::threads that survives fork() and leaves PyTorch's own thread pool alone.
#pragma once

#include <cstdint>
#include <functional>

namespace ltp {

// Runs body(worker) once on each of `threads` threads, worker = 0 (the caller) .. threads - 1, and waits for all.
// Fewer run if the system refuses to start more, so the body must take its work from a shared queue. The body sees the
// default floating-point environment: round to nearest, denormals kept. It must not throw.
void run_parallel(int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace ltp
