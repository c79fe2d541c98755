//! From a plan to a restore that only has to be put into place: everything new is made
//! in staging directories, durable, and the journal says what goes where.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CString;

use super::journal::{DirForm, Home, Journal, OpForm, PlaceForm, State, TraitsForm, form_of};
use super::make::Maker;
use super::place::{Place, full};
use super::plan::Plan;
use super::source::{Source, Traits};
use super::swap::{FEW, Swap};
use super::wanted::Wanted;
use super::{Options, Target};
use crate::Result;
use crate::progress::Progress;
use crate::store::manifest::{PathName, VERSION};
use crate::tree::dirs::{Node, as_path};

/// Makes everything; nothing is replaced yet. If it fails, nothing of it is left.
///
/// # Errors
///
/// There is no room; the snapshot is damaged; a directory cannot be written to; interrupted.
pub(super) fn stage(
    plan: &Plan,
    source: &Source<'_>,
    wanted: &Wanted,
    target: &Target,
    options: &Options,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Swap> {
    let mut used: BTreeSet<usize> = plan.ops.iter().map(|op| op.place).collect();
    if used.is_empty() {
        let differs = plan.touched.values().find(|touched| touched.differs);
        used.insert(differs.map_or(0, |touched| touched.place));
    }
    // Directories of one path have one staging directory.
    let mut numbers: HashMap<usize, usize> = HashMap::new();
    let mut parents: Vec<&std::path::Path> = Vec::new();
    for place in used {
        let path = plan.places[place].as_path();
        let number = parents.iter().position(|p| *p == path).unwrap_or_else(|| {
            parents.push(path);
            parents.len() - 1
        });
        numbers.insert(place, number);
    }
    let form = |parent: &&std::path::Path| PlaceForm {
        parent: PathName((*parent).to_owned()),
    };
    let mut swap = Swap {
        journal: Journal {
            version: VERSION,
            state: State::Staging,
            id: source.snapshot.id.clone(),
            time: jiff::Timestamp::now().to_string(),
            to: match target {
                Target::To(dir) => Some(PathName(dir.clone())),
                Target::InPlace => None,
            },
            keep: options.keep_replaced,
            settled_ns: None,
            places: parents.iter().map(form).collect(),
            dirs: Vec::new(),
            ops: Vec::new(),
        },
        places: vec![Place::make(parents[0])?],
    };
    let filled = fill(&mut swap, plan, source, wanted, &numbers, progress, go_on);
    if filled.is_err() {
        // What cannot be removed now, the next restore will.
        let _ = swap.discard();
    }
    filled.map(|()| swap)
}

fn fill(
    swap: &mut Swap,
    plan: &Plan,
    source: &Source<'_>,
    wanted: &Wanted,
    numbers: &HashMap<usize, usize>,
    progress: &mut dyn Progress,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<()> {
    // The journal names the other staging directories before there are any.
    swap.note(State::Staging)?;
    let home = swap.places[0].parent.clone();
    for form in &swap.journal.places[1..] {
        let place = Place::make(&form.parent.0)?;
        Home::write(&place.fd, &place.path, &home)?;
        swap.places.push(place);
    }
    let sync_each = plan.files.len() <= FEW;
    progress.begin("restoring", plan.bytes);
    let mut maker = Maker::new(
        source,
        wanted,
        &swap.places,
        (&plan.files, plan.bytes),
        sync_each,
        progress,
        go_on,
    )?;
    // Every directory that something happens in, or to, parents first.
    let mut dirs: BTreeMap<&std::path::Path, usize> = BTreeMap::new();
    let mut nodes: HashMap<Node, usize> = HashMap::new();
    let happens: BTreeSet<Node> = plan.ops.iter().map(|op| op.dir).collect();
    let parents: Vec<PathName> = swap
        .journal
        .places
        .iter()
        .map(|p| p.parent.clone())
        .collect();
    let mut forms: Vec<(Node, DirForm)> = Vec::new();
    for (node, touched) in &plan.touched {
        let path = plan.live.path(*node);
        let has_place = parents.iter().any(|parent| parent.0 == path);
        if !(touched.differs || happens.contains(node) || has_place) {
            continue;
        }
        let form = DirForm {
            path: PathName(path),
            ino: touched.id.ino,
            is_base: touched.is_base,
            old: TraitsForm::from(&touched.old),
            new: touched.new.as_ref().map(TraitsForm::from),
        };
        forms.push((*node, form));
    }
    forms.sort_by(|a, b| a.1.path.cmp(&b.1.path));
    for (i, (node, form)) in forms.iter().enumerate() {
        // Two bases may be one directory.
        let first = *dirs.entry(form.path.0.as_path()).or_insert(i);
        nodes.insert(*node, first);
    }
    let mut later: Vec<DirForm> = Vec::new();
    let mut ops: Vec<OpForm> = Vec::new();
    for (number, op) in plan.ops.iter().enumerate() {
        let place = numbers[&op.place];
        let name = CString::new(number.to_string()).unwrap_or_default();
        let new = match op.item {
            Some(item) => Some(maker.make(place, &name, item)?),
            None => None,
        };
        if let Some((ino, Some(traits))) = &new {
            let path = plan.live.path(op.dir).join(as_path(&op.name));
            let form = Some(TraitsForm::from(traits));
            later.push(moved_dir(path, *ino, traits, form));
        }
        if let (Some(id), Some(traits)) = (op.old, &op.old_dir) {
            let path = plan.live.path(op.dir).join(as_path(&op.name));
            later.push(moved_dir(path, id.ino, traits, None));
        }
        ops.push(OpForm {
            dir: nodes[&op.dir],
            name: form_of(&op.name),
            place,
            old: op.old.map(|id| id.ino),
            new: new.map(|(ino, _)| ino),
        });
    }
    for place in &swap.places {
        let done = match sync_each {
            true => rustix::fs::fsync(&place.fd),
            false => rustix::fs::syncfs(&place.fd),
        };
        done.map_err(|cause| full("write", &place.path, cause))?;
    }
    progress.end();
    swap.journal.dirs = forms
        .into_iter()
        .map(|(_, form)| form)
        .chain(later)
        .collect();
    swap.journal.ops = ops;
    Ok(())
}

/// A directory that is renamed itself: away, or into its place.
fn moved_dir(path: std::path::PathBuf, ino: u64, old: &Traits, new: Option<TraitsForm>) -> DirForm {
    DirForm {
        path: PathName(path),
        ino,
        is_base: false,
        old: TraitsForm::from(old),
        new,
    }
}
