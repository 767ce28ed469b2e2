//! A worker's core, on a ring of this machine's kernel.

use std::os::fd::AsRawFd;
use std::sync::mpsc;

use super::*;
use crate::sys::event::Event;
use crate::worker::turn::Message;

/// Longer than anything takes that works.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_worker_whose_submission_queue_is_full_hears_its_doorbell() {
    let mailbox = Mailbox::new().unwrap();
    let (tell, told) = mpsc::channel();
    let worker = std::thread::spawn({
        let mailbox = Arc::clone(&mailbox);
        move || {
            let size =
                Size { submissions: 4, completions: 32, files: 1, shared: false, deferred: true };
            let mut core = Core::new(size, Arc::clone(&mailbox)).unwrap();
            let (never, mut bytes) = (Event::new().unwrap(), Box::new(0u64));
            for _ in 0..core.ring.room() {
                let fd = types::Fd(never.as_raw_fd());
                let entry = io_uring::opcode::Read::new(fd, (&raw mut *bytes).cast(), 8);
                // SAFETY: nobody signals the event, so that the kernel never writes; and the memory outlives the
                // ring.
                unsafe { core.push(entry.build().user_data(Token::Cancel.encode())) };
            }
            assert_eq!(core.ring.room(), 0);
            assert!(!core.has_backlog() && mailbox.may_sleep());
            let mut harvest = Harvest::default();
            // The bell does not fit in. It is what wakes the worker.
            let mut turns = 0;
            while turns == 0 || core.bell_armed {
                core.enter(1).unwrap();
                core.reap(&mut harvest);
                turns += 1;
                tell.send(turns).unwrap();
            }
            drop(core);
            drop(bytes);
        }
    });
    assert_eq!(told.recv_timeout(SOON), Ok(1), "it sleeps, and nothing can wake it");
    assert!(mailbox.send(Message::End).is_ok());
    assert_eq!(told.recv_timeout(SOON), Ok(2), "the doorbell was not heard");
    worker.join().unwrap();
}

#[test]
fn tokens_survive_the_trip_through_the_kernel() {
    for token in [
        Token::Command { key: 0, tag: 0 },
        Token::Command { key: u32::MAX, tag: u16::MAX },
        Token::Command { key: 513, tag: 4095 },
        Token::Bell,
        Token::Operation(0),
        Token::Operation(u32::MAX),
        Token::Cancel,
        Token::Idle,
        Token::Register { key: 513, tag: 4095 },
        Token::Unregister,
        Token::Offer { key: 513 },
        Token::Fetch { key: 513 },
        Token::Commit { key: 513, index: 4095 },
    ] {
        assert_eq!(Token::decode(token.encode()), Some(token));
    }
    assert_eq!(Token::decode(0), None);
}
