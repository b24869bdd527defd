#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace ltp {
namespace {

using Body = std::function<void(int64_t)>;

// A flush-to-zero mode of the caller's thread (torch.set_flush_denormal) must not change results.
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

class Pool {
  public:
    const pid_t owner = getpid();

    void run(int64_t threads, const Body& body) {
        const std::lock_guard<std::mutex> one_job(job_mutex_);
        grow(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = &body;
            helpers_ = std::min(threads - 1, int64_t(workers_.size()));
            running_ = helpers_;
            ++generation_;
        }
        wake_.notify_all();
        body(0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    void grow(int64_t size) {
        while (int64_t(workers_.size()) < size) {
            try {
                workers_.emplace_back(&Pool::work, this, int64_t(workers_.size()) + 1, generation_);
            } catch (const std::system_error&) {
                return;
            }
        }
    }

    void work(int64_t worker, uint64_t seen) {
        const DefaultFloatEnvironment environment;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (worker > helpers_) continue;
            const Body& body = *body_;
            lock.unlock();
            body(worker);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex job_mutex_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const Body* body_ = nullptr;
    int64_t helpers_ = 0, running_ = 0;
    uint64_t generation_ = 0;
};

// The pool of this process. After fork() the parent's pool has no threads and its locks may be held for ever, so the
// child leaves it alone and makes its own. Pools are never destroyed: their threads wait until the process ends.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* found = current.load();
    while (found == nullptr || found->owner != getpid()) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

// The ABI of GNU OpenMP, which LLVM's and Intel's runtimes export as well: function, its argument, threads, flags.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> openmp{nullptr};
std::atomic<pid_t> openmp_owner{0};

struct Region {
    const Body& body;
    std::atomic<int64_t> next{0};

    static void enter(void* region) {
        const DefaultFloatEnvironment environment;
        Region& self = *static_cast<Region*>(region);
        self.body(self.next++);
    }
};

}  // namespace

void use_openmp(uintptr_t gomp_parallel) {
    openmp_owner = getpid();
    openmp = reinterpret_cast<GompParallel>(gomp_parallel);
}

void run_parallel(int64_t threads, const Body& body) {
    const GompParallel parallel = openmp;
    if (threads > 1 && parallel != nullptr && openmp_owner == getpid()) {
        Region region{body};
        parallel(Region::enter, &region, unsigned(threads), 0);
        return;
    }
    const DefaultFloatEnvironment environment;
    if (threads > 1) {
        pool().run(threads, body);
    } else {
        body(0);
    }
}

}  // namespace ltp
