//! The native half of the Python package `ublk`: private, wrapped by the typed Python around it.
//!
//! * [`calls`] calls a Python backend's methods and turns what they do into a request's answer;
//! * [`buffer`] shows requests' memory to Python;
//! * [`serve`] has the ways from a worker to those calls: on the worker itself, on a [`pool`] of threads, by an asyncio
//!   loop ([`line`]), or the raw requests ([`request`]);
//! * [`pace`] says when answers are given to the kernel;
//! * [`attend`] attaches workers to the interpreter, once, and steps back while they wait;
//! * [`options`], [`integrity`], [`device`], [`halted`], [`share`], [`targets`], [`files`], [`faults`], [`wrapped`], [`stats`] are the builder, the device and the ready-made backends;
//! * [`interrupt`] has calls that wait end with Ctrl-C;
//! * [`errors`] and [`log`] bring errors and messages over, [`words`] has them name what Python has.

mod attend;
mod buffer;
mod calls;
mod device;
mod errors;
mod faults;
mod files;
mod halted;
mod integrity;
mod interrupt;
mod line;
mod log;
mod machine;
mod options;
mod pace;
mod pool;
mod request;
mod serve;
mod share;
mod stats;
mod targets;
mod words;
mod wrapped;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use super::{Bound, PyModule, PyModuleMethods, PyResult};

    #[pymodule_export]
    use super::buffer::Buffer;
    #[pymodule_export]
    use super::calls::Calls;
    #[pymodule_export]
    use super::device::{Device, Workers, await_lost, finish_endings};
    #[pymodule_export]
    use super::faults::{Fault, WriteCache, room};
    #[pymodule_export]
    use super::files::{File, Stripe};
    #[pymodule_export]
    use super::halted::Halted;
    #[pymodule_export]
    use super::interrupt::{Leaving, Token, apart, shielded};
    #[pymodule_export]
    use super::line::Inbox;
    #[pymodule_export]
    use super::log::{close_log, forked, next_record};
    #[pymodule_export]
    use super::machine::{delete, feature_names, features, list_devices, quiesce};
    #[pymodule_export]
    use super::options::Spec;
    #[pymodule_export]
    use super::request::Request;
    #[pymodule_export]
    use super::share::SharedBuffer;
    #[pymodule_export]
    use super::targets::{Mem, Null, ZonedMem};

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        m.add("StateError", m.py().get_type::<super::errors::StateError>())?;
        m.add("GoneError", m.py().get_type::<super::errors::GoneError>())?;
        super::interrupt::prepare(m.py())?;
        super::log::install();
        Ok(())
    }
}
