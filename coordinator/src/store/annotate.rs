//! Changing what the manifest of a published snapshot says.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufWriter, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{MANIFEST, Store, StoreLock, TMP, fault, read};
use crate::error::Context;
use crate::{Error, Result};

impl Store {
    /// Sets, or with `None` takes away, fields of a published snapshot's manifest. All
    /// others stay byte for byte as they are, also those that this program does not know, at
    /// any depth.
    ///
    /// The new manifest replaces the old one by a rename, after it is durable. A crash
    /// leaves one or the other, and perhaps a `.tmp-*` in the set's directory for the next sweep.
    ///
    /// # Errors
    ///
    /// The manifest cannot be read, is damaged or of a later version; the store
    /// cannot be written.
    pub fn annotate(
        &self,
        lock: &StoreLock,
        id: &str,
        changes: &[(&str, Option<Value>)],
    ) -> Result<()> {
        let _ = lock;
        let unusable = |cause: String| {
            Error::new(format!("the snapshot {id} cannot be changed: {cause}"))
                .next("its files may still be whole; they are not vouched for")
        };
        let (dir, file) = self.open_manifest(id).map_err(unusable)?;
        let stat = rustix::fs::fstat(&file)
            .map_err(|cause| fault("look at", &self.path.join(id).join(MANIFEST), cause))?;
        let text = read::read_text(file).map_err(unusable)?;
        read::parse(&text, id).map_err(unusable)?;
        let Fields(mut fields) = serde_json::from_slice(&text)
            .map_err(|cause| unusable(format!("{MANIFEST} is damaged: {cause}")))?;
        let mut texts = Vec::new();
        for (name, value) in changes {
            let value = value.as_ref().map(serde_json::value::to_raw_value);
            texts.push((*name, value.transpose().context(|| "write JSON".into())?));
        }
        for (name, value) in &texts {
            change(&mut fields, name, value.as_deref());
        }
        // In the set's directory: there a sweep finds it without looking into snapshots.
        let temp = format!("{TMP}{MANIFEST}");
        let path = self.path.join(id).join(MANIFEST);
        let failed = |cause| fault("write", &path, cause);
        match rustix::fs::unlinkat(&self.dir, &temp, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(cause) => return Err(failed(cause)),
        }
        self.write_fields(&temp, &fields, &stat)
            .and_then(|()| rustix::fs::renameat(&self.dir, &temp, &dir, MANIFEST))
            .and_then(|()| rustix::fs::fsync(&dir))
            .map_err(failed)
    }

    /// Fields of a published snapshot's manifest as they are, also what this program
    /// does not know of them; `None` for those that are not there.
    ///
    /// # Errors
    ///
    /// The manifest cannot be read or is damaged.
    pub fn fields<const N: usize>(
        &self,
        lock: &StoreLock,
        id: &str,
        names: [&str; N],
    ) -> Result<[Option<Value>; N]> {
        let _ = lock;
        let read = || -> std::result::Result<_, String> {
            let (_, file) = self.open_manifest(id)?;
            let text = read::read_text(file)?;
            let damaged = |cause| format!("{MANIFEST} is damaged: {cause}");
            let Fields(fields) = serde_json::from_slice(&text).map_err(damaged)?;
            let mut found = names.map(|_| None);
            for (name, raw) in fields {
                if let Some(i) = names.iter().position(|wanted| *wanted == name) {
                    found[i] = Some(serde_json::from_str(raw.get()).map_err(damaged)?);
                }
            }
            Ok(found)
        };
        read().map_err(|cause| Error::new(format!("the snapshot {id} cannot be read: {cause}")))
    }

    fn write_fields(
        &self,
        name: &str,
        fields: &[(Cow<'_, str>, &RawValue)],
        like: &rustix::fs::Stat,
    ) -> rustix::io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file: OwnedFd = rustix::fs::openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)?;
        let made = rustix::fs::fstat(&file)?;
        if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid) {
            let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        let mut out = BufWriter::with_capacity(1 << 16, std::fs::File::from(file));
        write_object(&mut out, fields)
            .and_then(|()| out.flush())
            .and_then(|()| out.get_ref().sync_all())
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// Sets a field where it is, else before the list of files, which stays last.
fn change<'a>(
    fields: &mut Vec<(Cow<'a, str>, &'a RawValue)>,
    name: &'a str,
    value: Option<&'a RawValue>,
) {
    let at = |fields: &[(Cow<'a, str>, _)], name| fields.iter().position(|(n, _)| n == name);
    match (at(fields, name), value) {
        (Some(i), Some(value)) => fields[i].1 = value,
        (Some(i), None) => {
            fields.remove(i);
        }
        (None, Some(value)) => {
            let i = at(fields, "files").unwrap_or(fields.len());
            fields.insert(i, (name.into(), value));
        }
        (None, None) => {}
    }
}

/// In the layout in which manifests are written.
fn write_object(out: &mut impl Write, fields: &[(Cow<'_, str>, &RawValue)]) -> std::io::Result<()> {
    let mut before = "{\n  ";
    for (name, value) in fields {
        out.write_all(before.as_bytes())?;
        serde_json::to_writer(&mut *out, name)?;
        out.write_all(b": ")?;
        out.write_all(value.get().as_bytes())?;
        before = ",\n  ";
    }
    out.write_all(b"\n}\n")
}

/// The fields of an object in their order, their values as they are written.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct AsFields;
        impl<'de> Visitor<'de> for AsFields {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    fields.push((Cow::Owned(name), value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(AsFields)
    }
}
