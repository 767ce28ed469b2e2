//! A set of CPUs.

use std::fmt;

/// The CPUs that the block layer maps to a hardware queue, as `GET_QUEUE_AFFINITY` says.
///
/// The kernel lists possible CPUs, so that some may be offline.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct CpuSet(Vec<u64>);

impl CpuSet {
    /// From the kernel's bitmap: bit `n` of the words, counted through, is CPU `n`.
    pub fn from_words(words: impl IntoIterator<Item = u64>) -> Self {
        let mut words: Vec<_> = words.into_iter().collect();
        words.truncate(words.iter().rposition(|&w| w != 0).map_or(0, |last| last + 1));
        CpuSet(words)
    }

    /// Whether the CPU is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.get(cpu as usize / 64).is_some_and(|word| word >> (cpu % 64) & 1 == 1)
    }

    /// How many CPUs are in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether no CPU is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The CPUs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.0.len() as u32 * 64).filter(|&cpu| self.contains(cpu))
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        let mut words = Vec::new();
        for cpu in cpus {
            let at = cpu as usize / 64;
            if words.len() <= at {
                words.resize(at + 1, 0u64);
            }
            words[at] |= 1 << (cpu % 64);
        }
        CpuSet(words)
    }
}

/// As the kernel writes lists: `0-3,8`.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while cpus.next_if_eq(&(last + 1)).is_some() {
                last += 1;
            }
            write!(f, "{separator}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuSet({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_what_was_put_in() {
        let set: CpuSet = [0, 1, 2, 5, 64, 130].into_iter().collect();
        assert_eq!(set.to_string(), "0-2,5,64,130");
        assert_eq!(set.iter().collect::<Vec<_>>(), [0, 1, 2, 5, 64, 130]);
        assert_eq!(set.len(), 6);
        assert!(set.contains(64) && !set.contains(63) && !set.contains(100_000));
        assert_eq!(CpuSet::from_words([0b10_0111, 1, 0b100, 0, 0]), set);
        assert!(CpuSet::from_words([0; 16]).is_empty());
    }
}
