#include "base/sandbox/seccomp_filter.h"

#include <fcntl.h>
#include <linux/sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/error.h"

namespace perigee::sandbox {
namespace {

// Names, not numbers: a call that this architecture does not have is left out.
constexpr const char* kAllowed[] = {
    // files
    "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2", "pwritev2",
    "open", "openat", "openat2", "creat", "close", "close_range", "lseek", "stat", "fstat", "lstat",
    "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "getdents",
    "getdents64", "getcwd", "chdir", "fchdir", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "rmdir",
    "unlink", "unlinkat", "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod", "fchmodat", "chown",
    "fchown", "lchown", "fchownat", "mknod", "mknodat", "truncate", "ftruncate", "fallocate", "fsync",
    "fdatasync", "utime", "utimes", "futimesat", "utimensat", "umask", "dup", "dup2", "dup3", "pipe", "pipe2",
    "fcntl", "flock", "statfs", "fstatfs", "fadvise64", "sendfile", "splice", "tee", "copy_file_range",
    "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr",
    // waiting
    "poll", "ppoll", "select", "pselect6", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_wait",
    "epoll_pwait", "epoll_pwait2", "eventfd", "eventfd2", "timerfd_create", "timerfd_settime",
    "timerfd_gettime", "signalfd", "signalfd4", "pause", "nanosleep", "clock_nanosleep", "alarm", "setitimer",
    "getitimer", "timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete",
    // memory
    "munmap", "mremap", "mprotect", "madvise", "msync", "mincore", "brk", "membarrier",
    // processes and threads
    "fork", "vfork", "execve", "execveat", "exit", "exit_group", "wait4", "waitid", "kill", "tkill", "tgkill",
    "pidfd_open", "pidfd_send_signal", "getpid", "getppid", "gettid", "getpgrp", "getpgid", "setpgid",
    "getsid", "setsid", "getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups",
    "capget", "set_tid_address", "set_robust_list", "get_robust_list", "rseq", "futex", "futex_waitv",
    "sched_yield", "sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_getscheduler",
    "sched_get_priority_max", "sched_get_priority_min", "getpriority", "setpriority", "arch_prctl",
    "prlimit64", "getrlimit", "setrlimit", "getrusage", "times", "rt_sigaction", "rt_sigprocmask",
    "rt_sigreturn", "rt_sigpending", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigqueueinfo", "sigaltstack",
    "restart_syscall", "getcpu",
    // the machine
    "uname", "sysinfo", "clock_gettime", "clock_getres", "gettimeofday", "time", "getrandom",
    // a socketpair's two ends, within the sandbox; no call that passes descriptors, binds or connects
    "sendto", "recvfrom", "shutdown", "getsockopt", "getsockname", "getpeername"};

// Refused in so many words. Everything that is not listed at all answers ENOSYS.
constexpr const char* kRefused[] = {"socket",
                                    "connect",
                                    "bind",
                                    "listen",
                                    "accept",
                                    "accept4",
                                    "sendmsg",
                                    "sendmmsg",
                                    "recvmsg",
                                    "recvmmsg",
                                    "setsockopt",
                                    "ptrace",
                                    "process_vm_readv",
                                    "process_vm_writev",
                                    "pidfd_getfd",
                                    "kcmp",
                                    "mount",
                                    "umount2",
                                    "pivot_root",
                                    "chroot",
                                    "unshare",
                                    "setns",
                                    "keyctl",
                                    "add_key",
                                    "request_key",
                                    "bpf",
                                    "perf_event_open",
                                    "userfaultfd",
                                    "memfd_create",
                                    "memfd_secret",
                                    "shmget",
                                    "shmat",
                                    "semget",
                                    "msgget",
                                    "mq_open",
                                    "setuid",
                                    "setgid",
                                    "setreuid",
                                    "setregid",
                                    "setresuid",
                                    "setresgid",
                                    "setgroups",
                                    "setfsuid",
                                    "setfsgid",
                                    "capset",
                                    "personality",
                                    "reboot",
                                    "swapon",
                                    "swapoff",
                                    "syslog",
                                    "sethostname",
                                    "setdomainname",
                                    "init_module",
                                    "finit_module",
                                    "delete_module",
                                    "kexec_load",
                                    "open_by_handle_at",
                                    "name_to_handle_at",
                                    "quotactl",
                                    "acct",
                                    "settimeofday",
                                    "clock_settime",
                                    "adjtimex",
                                    "iopl",
                                    "ioperm",
                                    "modify_ldt",
                                    "sync",
                                    "syncfs",
                                    "setxattr",
                                    "lsetxattr",
                                    "fsetxattr"};

// Terminal questions and what a runtime asks of a descriptor. Not among them: TIOCSTI, TIOCLINUX, anything of a device.
constexpr std::array kIoctls = {TCGETS,   TIOCGWINSZ, TIOCGPGRP, TIOCSPGRP,
                                FIONREAD, FIONBIO,    FIOCLEX,   FIONCLEX};
constexpr std::array kPrctls = {PR_SET_NAME,         PR_GET_NAME,     PR_SET_PDEATHSIG,
                                PR_GET_PDEATHSIG,    PR_GET_DUMPABLE, PR_SET_NO_NEW_PRIVS,
                                PR_GET_NO_NEW_PRIVS, PR_CAPBSET_READ, PR_GET_SECCOMP};
constexpr uint64_t kNewNamespaces =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;

class Filter {
 public:
  Filter() : context_(seccomp_init(SCMP_ACT_ERRNO(ENOSYS))) {
    if (!context_) throw_environment("sandbox: libseccomp does not know this machine's architecture");
    check(seccomp_attr_set(context_.get(), SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS));
    // Looks calls up by halving instead of one after the other. An old libseccomp does not have it: slower, the same.
    seccomp_attr_set(context_.get(), SCMP_FLTATR_CTL_OPTIMIZE, 2);
  }

  void add(uint32_t action, const char* name, std::initializer_list<scmp_arg_cmp> arguments = {}) {
    const int number = seccomp_syscall_resolve_name(name);
    if (number < 0) return;
    check(seccomp_rule_add_array(context_.get(), action, number, static_cast<unsigned>(arguments.size()),
                                 arguments.begin()));
  }

  std::string program() const {
    const int fd = ::memfd_create("perigee-seccomp", MFD_CLOEXEC);
    if (fd < 0) throw_environment("sandbox: cannot create a memory file: {}", std::strerror(errno));
    const int error = seccomp_export_bpf(context_.get(), fd);
    std::string bytes(static_cast<size_t>(std::max<off_t>(0, ::lseek(fd, 0, SEEK_END))), '\0');
    const ssize_t got = ::pread(fd, bytes.data(), bytes.size(), 0);
    ::close(fd);
    check(error);
    PERIGEE_CHECK(got == static_cast<ssize_t>(bytes.size()) && !bytes.empty());
    return bytes;
  }

 private:
  static void check(int result) {
    if (result < 0) throw_environment("sandbox: libseccomp refuses the filter: {}", std::strerror(-result));
  }
  struct Release {
    void operator()(void* context) const { seccomp_release(context); }
  };
  std::unique_ptr<void, Release> context_;
};

std::string build() {
  Filter filter;
  for (const char* name : kAllowed) filter.add(SCMP_ACT_ALLOW, name);
  for (const char* name : kRefused) filter.add(SCMP_ACT_ERRNO(EPERM), name);
  // clone3 passes its flags in memory, out of a filter's sight: ENOSYS makes libraries use clone.
  filter.add(SCMP_ACT_ALLOW, "clone", {SCMP_A0_64(SCMP_CMP_MASKED_EQ, kNewNamespaces, 0)});
  for (const auto request : kIoctls)
    filter.add(SCMP_ACT_ALLOW, "ioctl", {SCMP_A1_64(SCMP_CMP_EQ, static_cast<uint64_t>(request))});
  for (const auto option : kPrctls)
    filter.add(SCMP_ACT_ALLOW, "prctl", {SCMP_A0_64(SCMP_CMP_EQ, static_cast<uint64_t>(option))});
  // Memory that is shared without a file has no size that anyone could see: all but a page of it can be unmapped and
  // still be held. Huge pages come out of a pool of the machine. Files in the sandbox's file systems can be shared.
  constexpr uint64_t kMapKinds = MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB;
  for (const uint64_t kind : {uint64_t{0}, uint64_t{MAP_SHARED}, uint64_t{MAP_ANONYMOUS}})
    filter.add(SCMP_ACT_ALLOW, "mmap", {SCMP_A3_64(SCMP_CMP_MASKED_EQ, kMapKinds, kind)});
  filter.add(SCMP_ACT_ALLOW, "socketpair", {SCMP_A0_64(SCMP_CMP_EQ, AF_UNIX)});
  return filter.program();
}

}  // namespace

const std::string& seccomp_program() {
  static const std::string program = build();
  return program;
}

}  // namespace perigee::sandbox
