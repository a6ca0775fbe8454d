//! The rank environment that launchers give their processes.

/// Where a process stands among those its launcher started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rank {
    /// 0 ..< `size`.
    pub rank: u32,
    /// Processes in all.
    pub size: u32,
    /// Rank among those on this host.
    pub local_rank: u32,
    /// Processes on this host.
    pub local_size: u32,
    /// Host of rank 0, where the launcher says.
    pub master: Option<String>,
}

/// The environment variables by which one kind of launcher says it.
struct Dialect {
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    local_size: &'static str,
    master: &'static str,
}

/// First match wins; MPI libraries also set each other's, in this order of
/// trust.
const DIALECTS: [Dialect; 5] = [
    Dialect {
        rank: "DISTKV_RANK",
        size: "DISTKV_SIZE",
        local_rank: "DISTKV_LOCAL_RANK",
        local_size: "DISTKV_LOCAL_SIZE",
        master: "DISTKV_MASTER",
    },
    Dialect {
        rank: "RANK",
        size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
        master: "MASTER_ADDR",
    },
    Dialect {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        master: "DISTKV_MASTER",
    },
    Dialect {
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
        master: "DISTKV_MASTER",
    },
    Dialect {
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_TASKS_PER_NODE",
        master: "SLURM_LAUNCH_NODE_IPADDR",
    },
];

/// The rank environment, if a launcher started this process. An error where
/// the variables are there but make no sense.
pub fn discover(env: impl Fn(&str) -> Option<String>) -> Result<Option<Rank>, String> {
    let Some(dialect) = DIALECTS.iter().find(|d| env(d.rank).is_some() && env(d.size).is_some()) else {
        return Ok(None);
    };
    let number = |name: &str| -> Result<Option<u32>, String> {
        let Some(text) = env(name) else { return Ok(None) };
        // Slurm writes lists such as `2(x3)`: the first number is ours where
        // all hosts are alike.
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().map(Some).map_err(|_| format!("{name}={text} is not a number"))
    };
    let rank = number(dialect.rank)?.unwrap_or(0);
    let size = number(dialect.size)?.unwrap_or(1);
    let local_rank = number(dialect.local_rank)?.unwrap_or(rank);
    let local_size = number(dialect.local_size)?.unwrap_or(size);
    if rank >= size {
        return Err(format!("{}={rank} is not below {}={size}", dialect.rank, dialect.size));
    }
    Ok(Some(Rank { rank, size, local_rank, local_size, master: env(dialect.master) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(pairs: &[(&str, &str)]) -> Result<Option<Rank>, String> {
        discover(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_string()))
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(from(&[]), Ok(None));
        let expected = Rank { rank: 2, size: 3, local_rank: 0, local_size: 1, master: None };
        let ompi = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "3"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
        ];
        assert_eq!(from(&ompi), Ok(Some(expected.clone())));
        let torchrun =
            [("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "h")];
        assert_eq!(from(&torchrun), Ok(Some(Rank { master: Some("h".into()), ..expected.clone() })));
        let slurm = [
            ("SLURM_PROCID", "2"),
            ("SLURM_NTASKS", "3"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_TASKS_PER_NODE", "1(x3)"),
            ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"),
        ];
        assert_eq!(from(&slurm), Ok(Some(Rank { master: Some("10.0.0.1".into()), ..expected })));
    }

    #[test]
    fn nonsense_is_an_error_that_names_the_variable() {
        assert!(from(&[("RANK", "x"), ("WORLD_SIZE", "3")]).is_err_and(|e| e.contains("RANK=x")));
        assert!(from(&[("RANK", "3"), ("WORLD_SIZE", "3")]).is_err_and(|e| e.contains("WORLD_SIZE=3")));
    }
}
