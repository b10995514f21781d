//! Processes joined by TCP, each with each other one, found through process 0.
//!
//! Process 0 listens where the launcher says; every other process tells it the port at which it listens
//! itself and gets the addresses of all. There is no authentication: as with other training programs the
//! network between the processes must be trusted.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::{Exchange, Launch};
use crate::error::{Error, Result};

/// How long processes wait for each other at the start.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a process waits for data; process 0 may tokenise a corpus meanwhile.
const READ_TIMEOUT: Duration = Duration::from_secs(6 * 3600);
/// First bytes of every connection: name and version of the protocol.
const MAGIC: [u8; 8] = *b"mmfree\0\x01";
/// Longest text of an address.
const MAX_ADDRESS: usize = 256;

/// Processes joined by TCP.
#[derive(Debug)]
pub struct Tcp {
    rank: usize,
    /// By rank; none for this process itself.
    peers: Vec<Option<TcpStream>>,
}

impl Tcp {
    /// Joins the processes of a launch.
    ///
    /// # Errors
    /// [`Error::Communication`] if the launcher names no process 0, or the processes do not find each
    /// other within five minutes.
    pub fn join(launch: &Launch) -> Result<Self> {
        let Some((host, port)) = &launch.master else {
            return Err(Error::Communication(format!(
                "this is process {} of {}, but MASTER_ADDR is not set: set it to the machine of process 0 \
                 and MASTER_PORT to a free port there",
                launch.rank, launch.world_size
            )));
        };
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let master = format!("{host}:{port}");
        let joined = if launch.rank == 0 {
            let listener = TcpListener::bind(("0.0.0.0", *port)).map_err(|reason| {
                Error::Communication(format!(
                    "process 0 cannot listen at port {port}: {reason}; choose another with MMFREE_PORT"
                ))
            })?;
            Self::lead(&listener, launch.world_size, deadline)
        } else {
            Self::follow(&master, launch, deadline)
        };
        joined.map_err(|reason| {
            Error::Communication(format!(
                "process {} of {} could not join the others at {master}: {reason}",
                launch.rank, launch.world_size
            ))
        })
    }

    /// Process 0: waits for all others, then tells them each other's addresses.
    fn lead(listener: &TcpListener, world: usize, deadline: Instant) -> io::Result<Self> {
        let mut peers: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        let mut addresses = vec![String::new(); world];
        while peers.iter().skip(1).any(Option::is_none) {
            let mut stream = accept(listener, deadline)?;
            // A stranger's connection is dropped; the processes are still to come.
            let Ok(hello) = Hello::read(&mut stream) else { continue };
            if hello.world as usize != world || hello.rank as usize >= world || hello.rank == 0 {
                return Err(io::Error::other(format!(
                    "a process says that it is {} of {}, this one is 0 of {world}",
                    hello.rank, hello.world
                )));
            }
            let mut address = stream.peer_addr()?;
            address.set_port(hello.port);
            addresses[hello.rank as usize] = address.to_string();
            if peers[hello.rank as usize].replace(stream).is_some() {
                return Err(io::Error::other(format!(
                    "two processes say that they are process {}",
                    hello.rank
                )));
            }
        }
        for peer in peers.iter_mut().flatten() {
            for address in &addresses {
                peer.write_all(&(address.len() as u32).to_le_bytes())?;
                peer.write_all(address.as_bytes())?;
            }
        }
        Self::ready(0, peers)
    }

    /// Another process: greets process 0, connects to those before it and waits for those after it.
    fn follow(master: &str, launch: &Launch, deadline: Instant) -> io::Result<Self> {
        let (rank, world) = (launch.rank, launch.world_size);
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let hello = Hello { world: world as u32, rank: rank as u32, port };
        let mut peers: Vec<Option<TcpStream>> = (0..world).map(|_| None).collect();
        let mut leader = connect(master, deadline)?;
        hello.write(&mut leader)?;
        leader
            .set_read_timeout(Some(deadline.saturating_duration_since(Instant::now()).max(TICK)))?;
        let mut addresses = Vec::with_capacity(world);
        for _ in 0..world {
            let mut length = [0; 4];
            leader.read_exact(&mut length)?;
            let length = u32::from_le_bytes(length) as usize;
            if length > MAX_ADDRESS {
                return Err(io::Error::other("what answers there is not this program"));
            }
            let mut address = vec![0; length];
            leader.read_exact(&mut address)?;
            addresses.push(String::from_utf8(address).map_err(io::Error::other)?);
        }
        peers[0] = Some(leader);
        for before in 1..rank {
            let mut stream = connect(&addresses[before], deadline)?;
            hello.write(&mut stream)?;
            peers[before] = Some(stream);
        }
        while peers.iter().enumerate().any(|(other, peer)| other > rank && peer.is_none()) {
            let mut stream = accept(&listener, deadline)?;
            let Ok(hello) = Hello::read(&mut stream) else { continue };
            let other = hello.rank as usize;
            if other > rank && other < world {
                peers[other] = Some(stream);
            }
        }
        Self::ready(rank, peers)
    }

    fn ready(rank: usize, peers: Vec<Option<TcpStream>>) -> io::Result<Self> {
        for peer in peers.iter().flatten() {
            peer.set_nodelay(true)?;
            peer.set_read_timeout(Some(READ_TIMEOUT))?;
        }
        Ok(Self { rank, peers })
    }
}

impl Exchange for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.peers.len()
    }

    fn describe(&self) -> String {
        format!("{} processes over TCP", self.peers.len())
    }

    fn exchange(&mut self, outgoing: &[&[u8]], incoming: &mut [&mut [u8]]) -> Result<()> {
        thread::scope(|scope| {
            // All send at once while all receive: nobody waits for a full buffer.
            let mut senders = Vec::new();
            for (rank, (peer, bytes)) in self.peers.iter().zip(outgoing).enumerate() {
                if let Some(mut peer) = peer.as_ref()
                    && !bytes.is_empty()
                {
                    senders.push((rank, scope.spawn(move || peer.write_all(bytes))));
                }
            }
            let mut received = Ok(());
            for (rank, (peer, bytes)) in self.peers.iter().zip(incoming).enumerate() {
                if let Some(mut peer) = peer.as_ref()
                    && received.is_ok()
                {
                    received = peer.read_exact(bytes).map_err(|reason| gone(rank, reason));
                }
            }
            if received.is_err() {
                // Senders must not wait for a reader that has given up.
                for peer in self.peers.iter().flatten() {
                    let _ = peer.shutdown(std::net::Shutdown::Both);
                }
            }
            for (rank, sender) in senders {
                let sent = sender.join().unwrap_or_else(|_| Err(io::Error::other("it panicked")));
                received = received.and(sent.map_err(|reason| gone(rank, reason)));
            }
            received
        })
    }

    fn check(&mut self) -> Result<()> {
        for (rank, peer) in self.peers.iter().enumerate() {
            let Some(peer) = peer else { continue };
            let look = || {
                peer.set_nonblocking(true)?;
                let seen = peer.peek(&mut [0]);
                peer.set_nonblocking(false)?;
                match seen {
                    Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                    // It is ahead of this process, or has nothing to say.
                    Ok(_) | Err(_) => Ok(()),
                }
            };
            look().map_err(|reason| gone(rank, reason))?;
        }
        Ok(())
    }
}

/// A process does not answer any more.
fn gone(rank: usize, reason: io::Error) -> Error {
    Error::Communication(format!(
        "process {rank} is gone ({reason}): its own output says why; start all processes again with --resume"
    ))
}

/// What a process says first.
struct Hello {
    world: u32,
    rank: u32,
    port: u16,
}

impl Hello {
    const LEN: usize = 18;

    fn write(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.world.to_le_bytes());
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.port.to_le_bytes());
        stream.write_all(&bytes)
    }

    fn read(stream: &mut TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut bytes = [0; Self::LEN];
        stream.read_exact(&mut bytes)?;
        let number = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[..8] != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self {
            world: number(8),
            rank: number(12),
            port: u16::from_le_bytes([bytes[16], bytes[17]]),
        })
    }
}

/// How often a missing process is looked for.
const TICK: Duration = Duration::from_millis(50);

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "not all processes came within five minutes")
}

fn accept(listener: &TcpListener, deadline: Instant) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(wait) if wait.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err(late());
                }
                thread::sleep(TICK);
            }
            Err(other) => return Err(other),
        }
    }
}

/// Connects to a process that may not be there yet.
fn connect(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let resolved: io::Result<Vec<SocketAddr>> =
            address.to_socket_addrs().map(Iterator::collect);
        let mut failed = io::Error::other("the host has no address");
        for address in resolved.unwrap_or_default() {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(stream) => return Ok(stream),
                Err(reason) => failed = reason,
            }
        }
        if Instant::now() > deadline {
            return Err(failed);
        }
        thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::communicator::{Communicator, Launcher, shards};

    /// Runs a function as each of several processes.
    fn world<T: Send>(size: usize, run: impl Fn(Tcp) -> T + Sync) -> Vec<T> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let run = &run;
        thread::scope(|scope| {
            let threads: Vec<_> = (0..size)
                .map(|rank| {
                    scope.spawn(move || {
                        run(Tcp::join(&Launch {
                            launcher: Launcher::Environment,
                            rank,
                            world_size: size,
                            local_rank: rank,
                            local_world_size: Some(size),
                            master: Some(("127.0.0.1".to_owned(), port)),
                        })
                        .unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn values(rank: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + rank * 13) % 101) as f32 * 0.37 - 3.0).collect()
    }

    #[test]
    fn collectives_agree_with_sums_in_the_fixed_order() {
        // More than one block of every shard, and shards of different lengths.
        for (size, len) in [(2, 3 * super::super::BLOCK + 5), (3, 100), (4, 64), (5, 3)] {
            let cuts = shards(len, 4, size);
            let results = world(size, |mut tcp| {
                let rank = Exchange::rank(&tcp);
                let mut buffer = values(rank, len);
                tcp.reduce_scatter(&mut buffer, &cuts).unwrap();
                tcp.all_gather(&mut buffer, &cuts).unwrap();
                let mut shared = values(rank, len);
                tcp.broadcast(&mut shared).unwrap();
                let bytes =
                    Communicator::<Vec<f32>>::gather_bytes(&mut tcp, &vec![rank as u8; rank]);
                (buffer, shared, bytes.unwrap())
            });
            fn tree(parts: &[f32]) -> f32 {
                match parts {
                    [one] => *one,
                    _ => {
                        let (left, right) = parts.split_at(parts.len() / 2);
                        tree(left) + tree(right)
                    }
                }
            }
            let all: Vec<_> = (0..size).map(|rank| values(rank, len)).collect();
            for (sums, shared, bytes) in results {
                for (at, sum) in sums.iter().enumerate() {
                    let parts: Vec<f32> = all.iter().map(|values| values[at]).collect();
                    assert_eq!(*sum, tree(&parts));
                }
                assert_eq!(shared, all[0]);
                let expected: Vec<_> = (0..size).map(|rank| vec![rank as u8; rank]).collect();
                assert_eq!(bytes, expected);
            }
        }
    }

    #[test]
    fn a_lost_process_is_noticed_by_the_others() {
        let errors = world(3, |mut tcp| {
            if Exchange::rank(&tcp) == 1 {
                return None;
            }
            let mut seen = Ok(());
            while seen.is_ok() {
                seen = Exchange::check(&mut tcp);
                thread::yield_now();
            }
            let barrier = Communicator::<Vec<f32>>::barrier(&mut tcp);
            Some([seen, barrier].map(|result| result.unwrap_err().to_string()).join(", "))
        });
        for error in errors.into_iter().flatten() {
            assert!(error.contains("is gone"), "{error}");
        }
    }
}
