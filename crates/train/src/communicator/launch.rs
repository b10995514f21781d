//! How this process was started: alone, or by a launcher as one of many.

use crate::error::{Error, Result};

/// Who started the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: this is the only process.
    None,
    /// `torchrun`, Kubernetes' training operators, a script: RANK and WORLD_SIZE are set.
    Environment,
    /// `srun`: SLURM_PROCID and SLURM_NTASKS are set.
    Slurm,
    /// `mpirun` or `mpiexec`: OMPI_COMM_WORLD_RANK or PMI_RANK are set.
    Mpi,
}

/// This process among those of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started it.
    pub launcher: Launcher,
    /// This process, from 0.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// This process among those of its machine, from 0.
    pub local_rank: usize,
    /// How many of them are on this machine, if the launcher tells.
    pub local_world_size: Option<usize>,
    /// Host and port at which process 0 is found.
    pub master: Option<(String, u16)>,
}

/// Most processes that are believed.
const MAX_WORLD_SIZE: usize = 1 << 16;

/// Port of process 0 where the launcher names none.
const DEFAULT_PORT: u16 = 29_400;

impl Launch {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// Variables that contradict each other or are no numbers, all named.
    pub fn from_environment() -> Result<Self> {
        Self::read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = get(name) else { return Ok(None) };
            match text.trim().parse() {
                Ok(number) if number <= MAX_WORLD_SIZE => Ok(Some(number)),
                _ => Err(Error::Communication(format!(
                    "the environment variable {name} is {text:?}, expected a number of processes"
                ))),
            }
        };
        let found = [
            (Launcher::Environment, ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
            (
                Launcher::Mpi,
                [
                    "OMPI_COMM_WORLD_RANK",
                    "OMPI_COMM_WORLD_SIZE",
                    "OMPI_COMM_WORLD_LOCAL_RANK",
                    "OMPI_COMM_WORLD_LOCAL_SIZE",
                ],
            ),
            (Launcher::Mpi, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]),
            (Launcher::Slurm, ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""]),
        ];
        for (launcher, [rank_name, size_name, local_name, local_size_name]) in found {
            let (rank, size) = match (number(rank_name)?, number(size_name)?) {
                (Some(rank), Some(size)) => (rank, size),
                (None, None) => continue,
                // A batch script of SLURM itself, outside `srun`, or a shell where one was exported.
                _ if launcher == Launcher::Slurm => continue,
                (rank, _) => {
                    let (set, missing) = if rank.is_some() {
                        (rank_name, size_name)
                    } else {
                        (size_name, rank_name)
                    };
                    return Err(Error::Communication(format!(
                        "the environment variable {set} is set, but {missing} is not: set both, or \
                         neither to train with one process"
                    )));
                }
            };
            // Interactive SLURM shells have these two without being a step of several tasks.
            if launcher == Launcher::Slurm && get("SLURM_STEP_ID").is_none() {
                continue;
            }
            if rank >= size {
                return Err(Error::Communication(format!(
                    "{rank_name} is {rank}, but {size_name} is {size}: ranks count from 0"
                )));
            }
            let local_rank = number(local_name)?;
            let local_world_size = match launcher {
                Launcher::Slurm => tasks_of_node(get),
                _ => number(local_size_name)?,
            };
            return Ok(Self {
                launcher,
                rank,
                world_size: size,
                local_rank: local_rank.unwrap_or(0),
                local_world_size,
                master: master(get)?,
            });
        }
        Ok(Self {
            launcher: Launcher::None,
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: None,
            master: None,
        })
    }
}

/// Processes on this machine: SLURM lists those of every machine of a step, as in `4(x2),3`.
fn tasks_of_node(get: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let list = get("SLURM_STEP_TASKS_PER_NODE").or_else(|| get("SLURM_TASKS_PER_NODE"))?;
    let mut node: usize = get("SLURM_NODEID")?.trim().parse().ok()?;
    for entry in list.split(',') {
        let (tasks, times) = match entry.trim().split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (entry.trim(), 1),
        };
        if node < times {
            return tasks.parse().ok();
        }
        node -= times;
    }
    None
}

/// Where process 0 is found. `torchrun` keeps MASTER_PORT for itself: the port after it is taken then.
fn master(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<(String, u16)>> {
    let host = get("MASTER_ADDR")
        .or_else(|| first_host(&get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"))?));
    let Some(host) = host else { return Ok(None) };
    let wrong = |name: &str, text: &str| {
        Error::Communication(format!(
            "the environment variable {name} is {text:?}, expected a port from 1 to 65535"
        ))
    };
    for name in ["MMFREE_PORT", "MASTER_PORT"] {
        let Some(text) = get(name) else { continue };
        let port = text.trim().parse().ok().filter(|&port: &u16| port > 0);
        let mut port = port.ok_or_else(|| wrong(name, &text))?;
        if name == "MASTER_PORT" && get("TORCHELASTIC_RUN_ID").is_some() {
            port = port.checked_add(1).unwrap_or(port - 1);
        }
        return Ok(Some((host, port)));
    }
    Ok(Some((host, DEFAULT_PORT)))
}

/// The first machine of a SLURM list: `a`, `a,b`, `node[003-007,9]`, `x[1-2]y`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let mut host = list[..end].to_owned();
    if let Some(inside) = list[end..].strip_prefix('[') {
        let close = inside.find(']')?;
        host.push_str(inside[..close].split([',', '-']).next()?);
        host.push_str(inside[close + 1..].split(',').next()?);
    }
    (!host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::read(&|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn every_launcher_is_recognised() {
        assert_eq!(read(&[]).unwrap().launcher, Launcher::None);
        let torchrun = read(&[
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "a.b"),
            ("MASTER_PORT", "1234"),
            ("TORCHELASTIC_RUN_ID", "x"),
        ])
        .unwrap();
        assert_eq!(torchrun.launcher, Launcher::Environment);
        assert_eq!((torchrun.rank, torchrun.world_size, torchrun.local_rank), (3, 4, 1));
        assert_eq!(torchrun.master, Some(("a.b".to_owned(), 1235)));
        let mpirun = read(&[
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ])
        .unwrap();
        assert_eq!((mpirun.launcher, mpirun.local_world_size), (Launcher::Mpi, Some(2)));
        let slurm = read(&[
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NODELIST", "node[007-009],other"),
            ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3"),
            ("SLURM_NODEID", "2"),
        ])
        .unwrap();
        assert_eq!(slurm.local_world_size, Some(3));
        assert_eq!(slurm.launcher, Launcher::Slurm);
        assert_eq!(slurm.master, Some(("node007".to_owned(), DEFAULT_PORT)));
        // A shell inside an allocation is no step.
        let shell = read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap();
        assert_eq!((shell.launcher, shell.world_size), (Launcher::None, 1));
    }

    #[test]
    fn contradictions_are_refused_with_their_names() {
        for (variables, expected) in [
            (&[("RANK", "0")][..], "WORLD_SIZE is not"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK is 2"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK is \"x\""),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "0")],
                "MASTER_PORT is \"0\"",
            ),
        ] {
            let error = read(variables).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn lists_of_machines_are_read() {
        for (list, host) in [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[01,05-7]x,m", "n01x")]
        {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        assert_eq!(first_host("n[1"), None);
    }
}
