"""What both vendors share: registers, MSRs, CPUID, segments, paging and events."""
