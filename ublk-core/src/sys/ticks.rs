//! The processor's time stamp counter.

/// Whether the counter counts at one rate whatever the processor does, sleep included, and the thread may read it. Its
/// rate, and whether the counters of all processors agree, nobody says.
pub(crate) fn are_even() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        is_invariant() && !is_forbidden()
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        false
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
fn is_invariant() -> bool {
    use core::arch::x86_64::__cpuid;
    /// The number of the highest extended leaf.
    const EXTENDED: u32 = 0x8000_0000;
    /// Advanced power management.
    const POWER: u32 = 0x8000_0007;
    /// In EDX.
    const INVARIANT_TSC: u32 = 1 << 8;
    #[allow(unused_unsafe, reason = "safe in newer toolchains")]
    // SAFETY: every x86-64 processor has the instruction, which changes nothing.
    let (highest, power) = unsafe { (__cpuid(EXTENDED).eax, __cpuid(POWER).edx) };
    highest >= POWER && power & INVARIANT_TSC != 0
}

/// Whether the program has forbidden itself the instruction, which would end it with SIGSEGV.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn is_forbidden() -> bool {
    let mut state: libc::c_int = 0;
    // SAFETY: PR_GET_TSC writes an integer to the address, which is valid for the call.
    let asked = unsafe { libc::prctl(libc::PR_GET_TSC, &raw mut state, 0, 0, 0) };
    // A kernel that does not know the question does not know the ban either.
    asked == 0 && state != libc::PR_TSC_ENABLE
}

/// The counter, where [they are even](are_even); elsewhere zero.
#[inline]
pub(crate) fn now() -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        // SAFETY: every x86-64 processor has the instruction, which touches no memory. A thread that has been forbidden
        // it is ended by the kernel with a signal, which is no undefined behaviour; workers ask first.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        0
    }
}
