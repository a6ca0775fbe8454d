//! What a connection says and hears before its first frame: the bootstrap of
//! [`secure`](crate::secure), or the plain greeting of an insecure transport.

use super::handshake::{Reader, greeting};
use crate::secure::{Bootstrap, Greeting, Heard, Opener, Purpose, Refused, Sealer, Security};

pub(super) struct Greeter {
    form: Form,
    /// Of the transport.
    incarnation: u64,
    /// It is we who connect: the answer has no hello.
    connecting: bool,
    hello: Vec<u8>,
}

enum Form {
    Plain(Reader),
    Sealed(Box<Bootstrap>),
    Done,
}

/// Frames may flow.
pub(super) struct Greeted {
    /// What the peer said of itself, if it connected to us.
    pub hello: Vec<u8>,
    /// Under what the frames are sealed.
    pub keys: Option<(Sealer, Opener)>,
}

impl Greeter {
    /// Of a side that connects; its first words are put in `out`.
    pub fn connect(security: &Security, incarnation: u64, hello: &[u8], out: &mut Vec<u8>) -> Result<Self, Refused> {
        let form = match security {
            Security::Insecure => {
                out.extend(greeting(hello));
                Form::Plain(Reader::default())
            }
            Security::Sealed(secret) => {
                let greeting = Greeting { incarnation, hello: hello.to_vec() };
                let mut bootstrap = Bootstrap::connect(secret, Purpose::Tcp, greeting)?;
                // What it posts early waits for the peer's ready.
                bootstrap.ready()?;
                take_output(&mut bootstrap, out);
                Form::Sealed(Box::new(bootstrap))
            }
        };
        Ok(Self { form, incarnation, connecting: true, hello: Vec::new() })
    }

    /// Of a side that is connected to.
    pub fn accept(security: &Security, incarnation: u64) -> Self {
        let form = match security {
            Security::Insecure => Form::Plain(Reader::default()),
            Security::Sealed(secret) => Form::Sealed(Box::new(Bootstrap::accept(secret, Purpose::Tcp))),
        };
        Self { form, incarnation, connecting: false, hello: Vec::new() }
    }

    /// Why a handshake ends early, as far as the side that connects can guess:
    /// whoever refuses says nothing.
    pub fn cut_off(&self) -> &'static str {
        match self.form {
            Form::Sealed(_) => "closed during the handshake: has it another cluster key?",
            _ => "closed during the handshake: is its fabric sealed, and ours insecure?",
        }
    }

    /// Takes from the front of `bytes` what belongs to the greeting; what is to
    /// be sent for it, even after an error, is put in `out`. Returns how many
    /// bytes that were, and once it is over what came of it.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(usize, Option<Greeted>), Refused> {
        match &mut self.form {
            Form::Plain(reader) => {
                let fed = reader.feed(bytes);
                if fed == Err(Refused::Sealed) && !self.connecting {
                    // No secret is kept here: the peer shall know why.
                    out.extend(greeting(&[]));
                }
                let (taken, hello) = fed?;
                let Some(hello) = hello else { return Ok((taken, None)) };
                self.check(&hello)?;
                if !self.connecting {
                    out.extend(greeting(&[]));
                }
                self.form = Form::Done;
                Ok((taken, Some(Greeted { hello, keys: None })))
            }
            Form::Sealed(_) => self.feed_sealed(bytes, out),
            Form::Done => Err(Refused::Over),
        }
    }

    fn feed_sealed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(usize, Option<Greeted>), Refused> {
        let mut taken = 0;
        loop {
            let Form::Sealed(bootstrap) = &mut self.form else { return Err(Refused::Over) };
            let (n, heard) = bootstrap.feed(&bytes[taken..])?;
            taken += n;
            if let Some(Heard::Greeting(greeting)) = &heard {
                if !self.connecting {
                    bootstrap.answer(Greeting { incarnation: self.incarnation, hello: Vec::new() })?;
                    bootstrap.ready()?;
                }
                self.hello.clone_from(&greeting.hello);
                self.check(&greeting.hello)?;
            }
            let Form::Sealed(bootstrap) = &mut self.form else { return Err(Refused::Over) };
            take_output(bootstrap, out);
            if bootstrap.is_complete() {
                break;
            }
            if heard.is_none() {
                return Ok((taken, None));
            }
        }
        let Form::Sealed(bootstrap) = std::mem::replace(&mut self.form, Form::Done) else {
            return Err(Refused::Over);
        };
        let hello = std::mem::take(&mut self.hello);
        let keys = bootstrap.finish().ok_or(Refused::Over)?;
        Ok((taken, Some(Greeted { hello, keys: Some(keys) })))
    }

    fn check(&self, hello: &[u8]) -> Result<(), Refused> {
        if self.connecting && !hello.is_empty() {
            return Err(Refused::Protocol("an answer with a hello"));
        }
        Ok(())
    }
}

fn take_output(bootstrap: &mut Bootstrap, out: &mut Vec<u8>) {
    while !bootstrap.output().is_empty() {
        out.extend_from_slice(bootstrap.output());
        let n = bootstrap.output().len();
        bootstrap.sent(n);
    }
}
