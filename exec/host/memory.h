// How much memory this host has to give.
#pragma once
#include <cstdint>
#include <filesystem>

namespace mop::host {

// Of the host, as the kernel counts it, in bytes. 0: not known.
int64_t total_memory(const std::filesystem::path& root = "/");

// Bytes that this process can still take: what the kernel calls available, or less where its control group,
// or one around that, is limited (cgroup v2, as containers and batch systems have it). 0: not known. root: of
// the file system, for tests.
int64_t available_memory(const std::filesystem::path& root = "/");

// Whether this is a virtual machine whose host adds memory as it is used: then what is available says little.
bool memory_grows(const std::filesystem::path& root = "/");

}  // namespace mop::host
