//! What must hold in a simulated world: of each instance after every event, of
//! all together once nothing happens any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use super::instance::Instance;
use crate::control::row::{Row, Stamp};
use crate::kv::block_table::Placement;
use crate::kv::rblock::{InstanceId, LoanId};

/// What holds of one instance at any time: every physical block is exactly one
/// of free, reserved, filling, live or held; what is lent is the sum of the
/// loans, block by block; what is held, the sequences and the prefix cache hold.
pub fn instance(it: &Instance) -> Result<(), String> {
    let table = it.pool.table();
    let counts = table.check_invariants()?;
    let manager = it.control.controller().rmanager();
    let mut lent = 0;
    for record in manager.loans() {
        lent += record.blocks.len() as u32;
        for block in &record.blocks {
            let owner = table.entry(*block).and_then(|entry| entry.loan());
            if owner != Some(record.loan) {
                return Err(format!("loan {} has block {block}, which is {owner:?}'s", record.loan.0));
            }
        }
    }
    if lent != manager.lent() || lent != counts.reserved + counts.lent {
        return Err(format!("loans of {lent} blocks, {} counted, {counts:?} in the table", manager.lent()));
    }
    if lent > manager.lend_cap() {
        return Err(format!("{lent} blocks lent, at most {} may be", manager.lend_cap()));
    }
    let mut held = BTreeSet::new();
    for sequence in it.sequences().filter_map(|seq| it.scheduler.get(seq)) {
        for placement in sequence.table.blocks() {
            if let Placement::Local(block) = placement {
                held.insert(block.index);
                if table.entry(block.index).is_none_or(|entry| entry.refs == 0 || entry.loan().is_some()) {
                    return Err(format!("sequence {} keeps KV in block {}, not its own", sequence.id, block.index));
                }
            }
        }
        let placed: usize = sequence.loans.iter().map(|loan| loan.placed).sum();
        if placed != sequence.table.remote() {
            let remote = sequence.table.remote();
            return Err(format!("sequence {} has {remote} blocks with creditors, {placed} placed", sequence.id));
        }
    }
    held.extend(it.scheduler.fetches().iter().map(|fetch| fetch.local.index));
    let cached = it.prefix.lock().unwrap_or_else(PoisonError::into_inner).len();
    let most = held.len() + cached;
    if (counts.held as usize) < held.len().max(cached) || counts.held as usize > most {
        return Err(format!("{} blocks held, {} by sequences and {cached} by the cache", counts.held, held.len()));
    }
    Ok(())
}

/// What holds of one instance's ledger at any time: a row is never newer than
/// its owner's own, and, while it is there, never gives way to an older one.
/// `seen` is what the last call saw.
pub fn ledger(it: &Instance, all: &[&Instance], seen: &mut BTreeMap<InstanceId, Stamp>) -> Result<(), String> {
    let ledger = it.control.controller().ledger();
    let now: BTreeMap<InstanceId, Stamp> = ledger.rows().map(|row| (row.instance, row.stamp)).collect();
    for (instance, stamp) in &now {
        if seen.get(instance).is_some_and(|before| stamp < before) {
            return Err(format!("the row of {instance} goes back from {:?} to {stamp:?}", seen.get(instance)));
        }
        let owner = all.iter().find(|other| other.id == *instance);
        let own = owner.and_then(|owner| owner.control.controller().ledger().get(*instance));
        if let Some(own) = own.filter(|own| own.stamp < *stamp) {
            return Err(format!("{instance} has written {:?}, and {stamp:?} is known of it", own.stamp));
        }
    }
    *seen = now;
    Ok(())
}

/// What holds of all ledgers once nothing has happened for a while: each has
/// the row that each living instance wrote last, and no other's.
pub fn ledgers(all: &[&Instance]) -> Result<(), String> {
    // What a debtor has learned of a creditor's memory itself it may correct.
    let plain = |row: &Row| Row { tiers: Vec::new(), ..row.clone() };
    let own = |it: &Instance| it.control.controller().ledger().get(it.id).map(plain);
    let written: Vec<_> = all.iter().map(|it| (it.id, own(it))).collect();
    for it in all {
        let ledger = it.control.controller().ledger();
        if let Some(row) = ledger.rows().find(|row| all.iter().all(|other| other.id != row.instance)) {
            return Err(format!("{} has a row of {}, which is no more", it.id, row.instance));
        }
        for (instance, own) in &written {
            let known = ledger.get(*instance);
            if known.map(plain) != *own {
                let stamps = (known.map(|row| row.stamp), own.as_ref().map(|row| row.stamp));
                return Err(format!("{} knows another row of {instance} than that one wrote: {stamps:?}", it.id));
            }
        }
    }
    Ok(())
}

/// What holds of all once nothing has happened for a while: creditors and
/// debtors have the same loans.
pub fn settled(all: &[&Instance]) -> Result<(), String> {
    type Loan = (InstanceId, InstanceId, LoanId, u32, Vec<u32>);
    let (mut given, mut taken): (Vec<Loan>, Vec<Loan>) = (Vec::new(), Vec::new());
    for it in all {
        let controller = it.control.controller();
        let loans = controller.rmanager().loans();
        given.extend(loans.map(|l| (it.id, l.debtor, l.loan, l.epoch, l.blocks.clone())));
        let debts = controller.debts().loans();
        taken.extend(debts.map(|l| (l.creditor, it.id, l.loan, l.epoch, l.blocks.clone())));
    }
    given.sort();
    taken.sort();
    match given == taken {
        true => Ok(()),
        false => Err(format!("creditors know {} loans, debtors {}: {given:?} and {taken:?}", given.len(), taken.len())),
    }
}

/// What holds at the very end, every request being answered: nothing is lent,
/// and nothing held but by the prefix cache.
pub fn over(it: &mut Instance) -> Result<(), String> {
    it.forget_prefixes();
    let counts = it.pool.table().check_invariants()?;
    let debts = it.control.controller().debts().borrowed();
    match counts.free == counts.total && debts == 0 {
        true => Ok(()),
        false => Err(format!("at the end {counts:?} and {debts} blocks borrowed")),
    }
}
