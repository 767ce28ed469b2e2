//! Requests made by hand, on slots that no kernel knows. Runs under Miri.

use super::*;
use crate::sys::memory::{Backing, Region};
use crate::worker::mailbox::Mailbox;
use crate::worker::slot::{Buffer, Place};

const LEN: u32 = 4096;

fn place() -> Place {
    Place { device: 3, queue: 1, tag: 7, key: 0 }
}

fn slot_on(mailbox: &Arc<Mailbox>) -> Arc<Slot> {
    let region = Arc::new(Region::new(LEN as usize, Backing::default()).unwrap());
    Slot::new(place(), Buffer::new(region, 0, LEN), None, Arc::clone(mailbox))
}

fn request_on(slot: &Arc<Slot>, op: Op, op_flags: u32, sectors: u32) -> Request {
    assert!(slot.issue());
    let desc = uapi::ublksrv_io_desc {
        op_flags,
        nr_sectors: sectors,
        start_sector: 9,
        addr: slot.buffer().start().as_ptr() as u64,
    };
    Request::new(Arc::clone(slot), op, &desc, None)
}

fn request(op: Op) -> (Arc<Mailbox>, Arc<Slot>, Request) {
    let mailbox = Mailbox::detached();
    let slot = slot_on(&mailbox);
    let request = request_on(&slot, op, 0, LEN / 512);
    (mailbox, slot, request)
}

fn soil(slot: &Slot) {
    slot.soil(LEN);
    // SAFETY: the slot's buffer has this length, and no request looks at it at the moment.
    unsafe { slot.buffer().start().as_ptr().write_bytes(0xee, LEN as usize) };
}

fn bytes(slot: &Slot) -> Vec<u8> {
    // SAFETY: as in `soil`; the request has ended.
    unsafe { std::slice::from_raw_parts(slot.buffer().start().as_ptr(), LEN as usize) }.to_vec()
}

fn taken(mailbox: &Mailbox) -> Vec<Arc<Slot>> {
    let mut finished = Vec::new();
    mailbox.take_finished(&mut finished);
    finished
}

const OK: Result<(), Errno> = Ok(());

fn filled(ranges: &[(u32, u32)]) -> Filled {
    let mut filled = Filled::default();
    ranges.iter().for_each(|(start, end)| filled.add(*start..*end));
    filled
}

/// The gaps of a buffer of ten bytes.
fn gaps(filled: &Filled) -> Vec<(u32, u32)> {
    filled.gaps(10).into_iter().map(|gap| (gap.start, gap.end)).collect()
}

#[test]
fn gaps_are_what_no_range_covers() {
    assert_eq!(gaps(&filled(&[])), [(0, 10)]);
    assert_eq!(gaps(&filled(&[(0, 10)])), []);
    assert_eq!(gaps(&filled(&[(0, 4)])), [(4, 10)]);
    assert_eq!(gaps(&filled(&[(4, 6)])), [(0, 4), (6, 10)]);
    assert_eq!(gaps(&filled(&[(8, 10), (4, 6)])), [(0, 4), (6, 8)]);
    assert_eq!(gaps(&filled(&[(4, 6), (4, 8), (5, 7)])), [(0, 4), (8, 10)]);
    // A range that closes the gap takes the islands behind it along.
    let closed = filled(&[(4, 6), (8, 9), (6, 8), (0, 4)]);
    assert_eq!(gaps(&closed), [(9, 10)]);
    assert_eq!((closed.upto, closed.islands.len()), (9, 0));
}

#[test]
fn gaps_agree_with_a_map_of_bytes() {
    let rounds = if cfg!(miri) { 30 } else { 3000 };
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        ((seed >> 33) as u32) % below
    };
    for _ in 0..rounds {
        let mut filled = Filled::default();
        let mut map = [false; 64];
        for _ in 0..random(8) {
            let start = random(64);
            let end = start + random(65 - start);
            filled.add(start..end);
            map[start as usize..end as usize].fill(true);
        }
        let mut gaps = [true; 64];
        for gap in filled.gaps(64) {
            assert!(gap.start < gap.end);
            gaps[gap.start as usize..gap.end as usize].fill(false);
        }
        assert_eq!(gaps, map);
    }
}

#[test]
fn a_request_says_what_the_descriptor_said() {
    let mailbox = Mailbox::detached();
    let slot = slot_on(&mailbox);
    let flags = uapi::UBLK_IO_F_FUA | uapi::UBLK_IO_F_META;
    let request = request_on(&slot, Op::Write, uapi::UBLK_IO_OP_WRITE | flags, 2);
    assert_eq!((request.op(), request.offset(), request.len()), (Op::Write, 9 * 512, 1024));
    assert_eq!((request.device(), request.queue(), request.tag()), (3, 1, 7));
    assert!(request.flags().fua() && request.flags().meta());
    assert!(!request.flags().no_unmap() && !request.flags().swap());
    assert_eq!(request.flags().raw(), flags);
    assert_eq!(request.data().len(), 1024);
}

#[test]
fn what_has_no_data_gives_none() {
    for op in [Op::Flush, Op::Discard, Op::WriteZeroes] {
        let (mailbox, slot, mut request) = request(op);
        assert!(request.data().is_empty() && request.data_mut().is_empty());
        request.complete(OK).unwrap();
        assert_eq!(slot.outcome().unwrap().result, Ok(0));
        assert_eq!(taken(&mailbox).len(), 1);
    }
    assert!(request(Op::Read).2.data().is_empty());
    assert!(request(Op::Write).2.data_mut().is_empty());
}

#[test]
#[should_panic(expected = "len <= u64::from")]
fn a_request_beyond_its_buffer_cannot_be_made() {
    let slot = slot_on(&Mailbox::detached());
    request_on(&slot, Op::Read, 0, LEN / 512 + 1);
}

#[test]
fn a_discard_may_be_larger_than_any_buffer() {
    let slot = slot_on(&Mailbox::detached());
    let request = request_on(&slot, Op::Discard, 0, u32::MAX);
    assert_eq!(request.len(), u64::from(u32::MAX) * 512);
    request.complete(OK).unwrap();
}

#[test]
fn what_was_not_filled_is_zeroed() {
    /// What is done, and the byte at each place afterwards.
    type Case = (fn(&mut Request), fn(usize) -> u8);
    let cases: [Case; 5] = [
        (|_| {}, |_| 0),
        (|r| r.put(10, &[1; 20]), |i| u8::from((10..30).contains(&i))),
        (
            |r| {
                r.put(4000, &[2; 96]);
                r.put(0, &[1; 8]);
            },
            |i| if i < 8 { 1 } else { 2 * u8::from(i >= 4000) },
        ),
        (
            |r| {
                r.put(0, &[3; 4096]);
                r.put_zeroes(8, 4080);
            },
            |i| 3 * u8::from(!(8..4088).contains(&i)),
        ),
        (|r| r.data_mut()[5] = 9, |i| 9 * u8::from(i == 5)),
    ];
    for (fill, expected) in cases {
        let mailbox = Mailbox::detached();
        let slot = slot_on(&mailbox);
        soil(&slot);
        let mut request = request_on(&slot, Op::Read, 0, LEN / 512);
        fill(&mut request);
        request.complete(OK).unwrap();
        let expected: Vec<u8> = (0..LEN as usize).map(expected).collect();
        assert_eq!(bytes(&slot), expected);
        assert_eq!(slot.outcome().unwrap().result, Ok(LEN));
    }
}

#[test]
fn what_was_put_is_seen_by_data_mut() {
    let (_mailbox, slot, mut request) = request(Op::Read);
    request.put(100, &[4; 4]);
    assert_eq!(&request.data_mut()[99..105], [0, 4, 4, 4, 4, 0]);
    request.put(0, b"abc");
    assert_eq!(&request.data_mut()[..4], b"abc\0");
    drop(request);
    assert!(slot.outcome().unwrap().dropped);
}

#[test]
fn puts_outside_of_the_buffer_panic() {
    type Put = fn(&mut Request);
    let puts: [Put; 5] = [
        |r| r.put(4096, &[0]),
        |r| r.put(4000, &[0; 97]),
        |r| r.put(usize::MAX, &[0; 2]),
        |r| r.put_zeroes(1, 4096),
        |r| r.put_zeroes(usize::MAX, usize::MAX),
    ];
    for put in puts {
        let (_mailbox, _slot, mut request) = request(Op::Read);
        let put = std::panic::AssertUnwindSafe(|| put(&mut request));
        assert!(std::panic::catch_unwind(put).is_err());
        request.put(4096, &[]);
        request.put_zeroes(0, 4096);
        request.complete(OK).unwrap();
    }
    let (_mailbox, _slot, mut write) = request(Op::Write);
    let put = std::panic::AssertUnwindSafe(|| write.put(0, &[0]));
    assert!(std::panic::catch_unwind(put).is_err());
}

#[test]
fn an_answer_goes_to_the_mailbox_once() {
    let (mailbox, slot, request) = request(Op::Write);
    request.complete(Err(Errno::ENOSPC)).unwrap();
    let finished = taken(&mailbox);
    assert!(finished.len() == 1 && Arc::ptr_eq(&finished[0], &slot));
    let outcome = Outcome { result: Err(Errno::ENOSPC), dropped: false, keeps_buffer: false };
    assert_eq!(slot.outcome(), Some(outcome));
    assert!(taken(&mailbox).is_empty());
}

#[test]
fn a_drop_is_eio_and_says_so() {
    let (mailbox, slot, request) = request(Op::Read);
    drop(request);
    assert_eq!(taken(&mailbox).len(), 1);
    let outcome = Outcome { result: Err(Errno::EIO), dropped: true, keeps_buffer: false };
    assert_eq!(slot.outcome(), Some(outcome));
}

#[test]
fn a_flush_never_ends_with_eopnotsupp() {
    for (op, expected) in [(Op::Flush, Errno::EIO), (Op::Discard, Errno::EOPNOTSUPP)] {
        let (_mailbox, slot, request) = request(op);
        request.complete(Err(Errno::EOPNOTSUPP)).unwrap();
        assert_eq!(slot.outcome().unwrap().result, Err(expected));
    }
}

#[test]
fn a_kept_buffer_stays_readable_and_writable_for_its_keeper() {
    let (mailbox, slot, mut request) = request(Op::Read);
    request.data_mut().fill(6);
    let kept = request.keep_buffer();
    request.complete(OK).unwrap();
    assert!(slot.outcome().unwrap().keeps_buffer);
    // SAFETY: as below.
    unsafe { kept.as_ptr().write_bytes(5, 100) };
    let moved = slot.take_moved().unwrap();
    // SAFETY: the region is as long as the buffer, and nobody else's.
    assert_eq!(unsafe { moved.at(0).read() }, 6, "the client gets what was there at the end");
    drop((taken(&mailbox), slot, mailbox));
    assert_eq!((kept.len(), kept.is_empty()), (LEN as usize, false));
    // SAFETY: the buffer is valid while `kept` lives, and nobody else's.
    unsafe {
        assert_eq!(kept.as_ptr().add(4095).read(), 6);
        kept.as_ptr().write_bytes(7, kept.len());
    }
}

#[test]
fn a_revoked_request_is_gone_and_its_memory_is_not() {
    for end in [
        |r: Request| r.complete(OK).unwrap_err(),
        |r: Request| r.complete(Err(Errno::EIO)).unwrap_err(),
        |mut r: Request| {
            let kept = r.keep_buffer();
            let told = r.complete(OK);
            // SAFETY: the buffer is valid while `kept` lives, whoever was answered.
            assert_eq!(unsafe { kept.as_ptr().add(4095).read() }, 1);
            told.unwrap_err()
        },
    ] {
        let (mailbox, slot, mut request) = request(Op::Read);
        assert!(slot.revoke());
        drop(slot);
        request.data_mut().fill(1);
        assert_eq!(request.data_mut(), &[1; LEN as usize]);
        assert_eq!(end(request), Gone { device: 3, queue: 1, tag: 7 });
        assert!(taken(&mailbox).is_empty());
    }
    // A drop after that is quiet.
    let (mailbox, slot, request) = request(Op::Write);
    assert!(slot.revoke());
    drop(request);
    assert!(taken(&mailbox).is_empty());
}

#[test]
fn a_request_whose_worker_is_gone_is_gone() {
    let (mailbox, _slot, mut request) = request(Op::Read);
    mailbox.close();
    request.data_mut().fill(1);
    assert_eq!(request.complete(OK), Err(Gone { device: 3, queue: 1, tag: 7 }));
}

#[test]
fn while_a_ring_operation_is_in_flight_nobody_gets_a_reference() {
    let (mailbox, slot, mut request) = request(Op::Read);
    slot.begin_operation();
    let access = std::panic::AssertUnwindSafe(|| request.data_mut().fill(1));
    assert!(std::panic::catch_unwind(access).is_err());
    let access = std::panic::AssertUnwindSafe(|| request.put(0, &[1]));
    assert!(std::panic::catch_unwind(access).is_err());
    // Nor can it succeed with bytes that the kernel may be writing still.
    request.complete(OK).unwrap();
    assert_eq!(slot.outcome().unwrap().result, Err(Errno::EIO));
    assert_eq!(slot.end_operation(), 0);
    assert_eq!(taken(&mailbox).len(), 1);
}

#[test]
fn what_the_ring_filled_counts_as_filled() {
    let mailbox = Mailbox::detached();
    let slot = slot_on(&mailbox);
    soil(&slot);
    let mut request = request_on(&slot, Op::Read, 0, LEN / 512);
    request.filled_by_ring(0..4000);
    assert!(!request.is_filled());
    request.filled_by_ring(4000..LEN);
    assert!(request.is_filled());
    request.complete(OK).unwrap();
    assert_eq!(bytes(&slot), [0xee; LEN as usize]);
}

#[test]
fn a_request_is_answered_by_whichever_thread_has_it() {
    let mailbox = Mailbox::detached();
    let requests: Vec<_> = (0..4)
        .map(|_| {
            let slot = slot_on(&mailbox);
            request_on(&slot, Op::Read, 0, LEN / 512)
        })
        .collect();
    std::thread::scope(|s| {
        for (i, mut request) in requests.into_iter().enumerate() {
            s.spawn(move || {
                request.data_mut().fill(i as u8);
                request.complete(OK).unwrap();
            });
        }
    });
    let mut first: Vec<_> = taken(&mailbox).iter().map(|slot| bytes(slot)[0]).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
}

#[test]
fn an_append_says_where_it_went_or_fails() {
    // The request's zone starts at sector 9.
    for (offset, outcome, sector) in
        [(9 << 9, Ok(LEN), 9), (20 << 9, Ok(LEN), 20), (8 << 9, Err(Errno::EIO), 0)]
    {
        let (_mailbox, slot, request) = request(Op::ZoneAppend);
        assert_eq!(request.data().len(), LEN as usize);
        request.complete_append(offset).unwrap();
        assert_eq!((slot.outcome().unwrap().result, slot.append_sector()), (outcome, sector));
        // What comes next on the tag is none.
        slot.recycle();
        assert!(slot.issue());
        assert_eq!(slot.append_sector(), 0);
    }
    let (_mailbox, slot, request) = request(Op::ZoneAppend);
    request.complete(OK).unwrap();
    assert_eq!(slot.outcome().unwrap().result, Err(Errno::EIO), "it did not say where");
}

#[test]
fn what_is_no_append_has_no_place_and_a_report_is_no_mere_success() {
    let (_mailbox, slot, write) = request(Op::Write);
    write.complete_append(9 << 9).unwrap();
    assert_eq!((slot.outcome().unwrap().result, slot.append_sector()), (Err(Errno::EIO), 0));
    for told in [false, true] {
        let (_mailbox, slot, report) = request(Op::ReportZones);
        assert_eq!((report.len(), report.zones()), (0, LEN / 512));
        match told {
            true => report.complete_report(&[]).unwrap(),
            false => report.complete(OK).unwrap(),
        }
        assert_eq!(slot.outcome().unwrap().result, Err(Errno::EIO));
    }
    let (_mailbox, slot, open) = request(Op::ZoneOpen);
    assert_eq!(open.op().zone_action(), Some(crate::zones::ZoneAction::Open));
    open.complete(OK).unwrap();
    assert_eq!(slot.outcome().unwrap().result, Ok(0));
}

#[test]
fn without_metadata_there_is_none_to_be_had() {
    let (_mailbox, _slot, mut read) = request(Op::Read);
    assert_eq!(read.metadata_len(), 0);
    assert_eq!(read.put_metadata(&[]), Err(Errno::EINVAL));
    assert_eq!(read.metadata(&mut []), Err(Errno::EINVAL));
}

const _: () = {
    const fn sent<T: Send>() {}
    sent::<Request>();
    sent::<KeptBuffer>();
};

#[test]
fn pages_are_for_other_rings_on_zero_copy_alone() {
    let (_mailbox, _slot, request) = request(Op::Read);
    assert_eq!(request.register_entry(0), Err(Errno::EOPNOTSUPP));
    assert_eq!(request.unregister_entry(0), Err(Errno::EOPNOTSUPP));
}

#[test]
#[cfg_attr(miri, ignore = "opens a file")]
fn entries_name_the_request_and_what_rings_read_is_not_zeroed() {
    use crate::sys::fork::OwnFd;
    use crate::worker::portal::{Portal, Reach};
    use std::os::fd::AsRawFd;

    // Writing to it fails: a request that zeroed its client's pages would end with EIO.
    let options = std::fs::OpenOptions::new().read(true).clone();
    let file = Arc::new(OwnFd::open_file(&options, std::path::Path::new("/dev/null")).unwrap());
    let portal = Portal::new(&file, DataPath::ZeroCopy, None);
    let mailbox = Mailbox::detached();
    let region = Arc::new(Region::new(LEN as usize, Backing::default()).unwrap());
    let reach = Reach::new(portal, 5);
    let slot = Slot::new(place(), Buffer::new(region, 0, LEN), Some(reach), Arc::clone(&mailbox));

    let read = request_on(&slot, Op::Read, 0, LEN / 512);
    let (enter, leave) = (read.register_entry(2).unwrap(), read.unregister_entry(2).unwrap());
    let word =
        |entry: &[u8; 64], at: usize| u32::from_ne_bytes(entry[at..][..4].try_into().unwrap());
    for (entry, op) in [(enter, 0xC010_7523), (leave, 0xC010_7524)] {
        assert_eq!(word(&entry, 4), file.as_raw_fd().cast_unsigned());
        assert_eq!(word(&entry, 8), op);
        assert_eq!(word(&entry, 48), 1 | 7 << 16, "queue and tag");
        assert_eq!(word(&entry, 56), 2, "the place");
        assert_eq!(entry[32..40], [0; 8], "user_data is the caller's");
    }
    read.complete(OK).unwrap();
    assert_eq!(taken(&mailbox)[0].outcome().unwrap().result, Ok(LEN));
    slot.recycle();

    let flush = request_on(&slot, Op::Flush, 0, 0);
    assert_eq!(flush.register_entry(2), Err(Errno::EINVAL));
    flush.complete(OK).unwrap();
    taken(&mailbox);
    slot.recycle();

    // Not asked for: it is zeroed, which the file does not take.
    let read = request_on(&slot, Op::Read, 0, LEN / 512);
    read.complete(OK).unwrap();
    assert_eq!(taken(&mailbox)[0].outcome().unwrap().result, Err(Errno::EIO));
    slot.recycle();

    let late = request_on(&slot, Op::Write, 0, LEN / 512);
    drop(file);
    assert_eq!(late.register_entry(2), Err(Errno::ENODEV));
}
