//! From blocking calls to futures that make them.

use std::io;

use crate::backend::{AsyncBackend, Backend, Capabilities};
use crate::request::Request;
use crate::worker::ring::Ring;
use crate::worker::serve::{read_all, write_all};
use crate::zones::{Zone, ZoneAction};

/// A blocking backend as an asynchronous one: its calls are made on the worker, by the request's future.
///
/// For backends that do not really block, such as [`Mem`](super::Mem) and [`Null`](super::Null), where something around
/// them waits: [`Fault`](super::Fault) delays and holds requests of an asynchronous backend without keeping its worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnWorker<B>(pub B);

impl<B: Backend> AsyncBackend for OnWorker<B> {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn read(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        let offset = request.offset();
        read_all(&self.0, request.data_mut(), offset)
    }

    async fn write(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        let (offset, flags) = (request.offset(), request.flags());
        write_all(request.data(), |data, done| self.0.write(data, offset + done, flags))
    }

    async fn flush(&self, _: &Ring) -> io::Result<()> {
        self.0.flush()
    }

    async fn discard(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.0.discard(request.offset(), request.len())
    }

    async fn write_zeroes(&self, request: &mut Request, _: &Ring) -> io::Result<()> {
        self.0.write_zeroes(request.offset(), request.len(), request.flags())
    }

    async fn report_zones(&self, offset: u64, count: u32, _: &Ring) -> io::Result<Vec<Zone>> {
        self.0.report_zones(offset, count)
    }

    async fn append(&self, request: &mut Request, _: &Ring) -> io::Result<u64> {
        let (zone, flags) = (request.offset(), request.flags());
        self.0.append(request.data(), zone, flags)
    }

    async fn zone_action(&self, action: ZoneAction, zone: u64, _: &Ring) -> io::Result<()> {
        self.0.zone_action(action, zone)
    }
}
