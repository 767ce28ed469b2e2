//! Chance that can be repeated.

/// SplitMix64: the same numbers on every machine and in every version, which is what a seed is for.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64, sequence: u64) -> Self {
        let mut random = Random(seed);
        let start = random.next();
        Random(start ^ sequence.wrapping_mul(0xd134_2543_de82_ef95))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// At least 0 and below 1.
    pub(super) fn below_one(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
