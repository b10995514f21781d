//! Files and directories that appear complete or not at all.
//!
//! Everything is written beside its final name and renamed at the end; what is not committed is removed. Once
//! `commit` has returned, the new name outlasts a loss of power.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Prefix of names that are not final yet.
const PREFIX: &str = ".mmfree-";

/// A file that takes its name when it is [committed](Self::commit). Dropped before, it leaves nothing.
#[derive(Debug)]
pub struct OutputFile {
    writer: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl OutputFile {
    /// Begins a file. One that has the name already is replaced when the new one is complete.
    ///
    /// # Errors
    /// A directory that cannot be written, or a name that belongs to something else than a file.
    pub fn create(path: &Path) -> Result<Self> {
        let error = |reason| Error::Write { file: path.display().to_string(), reason };
        // A link keeps pointing where it points: its target is replaced.
        let path = match fs::canonicalize(path) {
            Ok(target) => target,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => path.to_owned(),
            Err(other) => return Err(error(other)),
        };
        if path.exists() && !path.is_file() {
            return Err(error(io::Error::other("it exists and is not a regular file")));
        }
        if path.file_name().is_none() {
            return Err(error(io::Error::other("this is not the name of a file")));
        }
        let mut builder = Builder::new();
        builder.prefix(PREFIX);
        // The permissions of any new file, instead of the private ones of temporary files.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary =
            builder.tempfile_in(parent(&path)).map_err(|failed| error(plain(failed, &path)))?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, temporary), path })
    }

    /// Gives the complete file its name.
    ///
    /// # Errors
    /// Errors of writing, a full disk for example. Nothing is left then.
    pub fn commit(self) -> Result<()> {
        let error = |reason| Error::Write { file: self.path.display().to_string(), reason };
        let temporary = self
            .writer
            .into_inner()
            .map_err(|failed| error(plain(failed.into_error(), &self.path)))?;
        temporary.as_file().sync_all().map_err(error)?;
        temporary.persist(&self.path).map_err(|failed| error(failed.error))?;
        sync_directory(parent(&self.path)).map_err(error)
    }

    /// Writes bytes; as [`Write::write_all`], with the name of the file in the error.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|failed| Error::Write {
            file: self.path.display().to_string(),
            reason: plain(failed, &self.path),
        })
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

/// A directory that takes its name when it is [committed](Self::commit). Dropped before, it leaves
/// nothing.
#[derive(Debug)]
pub struct OutputDirectory {
    temporary: TempDir,
    path: PathBuf,
}

impl OutputDirectory {
    /// Begins a directory.
    ///
    /// # Errors
    /// The name exists and is not an empty directory; the parent cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let error = |reason| Error::Write { file: path.display().to_string(), reason };
        match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => return Err(error(io::Error::other("the directory is not empty"))),
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => {}
            Err(other) => return Err(error(other)),
        }
        let mut builder = Builder::new();
        builder.prefix(PREFIX);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let temporary =
            builder.tempdir_in(parent(path)).map_err(|failed| error(plain(failed, path)))?;
        Ok(Self { temporary, path: path.to_owned() })
    }

    /// Writes a file of the directory.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write_with(name, |file| file.write_all(bytes))
    }

    /// Writes a file of the directory piece by piece.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write_with(
        &self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let write = || {
            let file = File::create_new(self.temporary.path().join(name))?;
            let mut writer = BufWriter::with_capacity(1 << 20, file);
            fill(&mut writer)?;
            writer.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
        };
        write().map_err(|reason| Error::Write {
            file: self.path.join(name).display().to_string(),
            reason,
        })
    }

    /// Gives the complete directory its name.
    ///
    /// # Errors
    /// [`Error::Write`]. Nothing is left then.
    pub fn commit(self) -> Result<()> {
        let error = |reason| Error::Write { file: self.path.display().to_string(), reason };
        sync_directory(self.temporary.path()).map_err(error)?;
        fs::rename(self.temporary.path(), &self.path).map_err(error)?;
        // It has moved away from where the guard would remove it.
        let _ = self.temporary.keep();
        sync_directory(parent(&self.path)).map_err(error)
    }
}

/// Removes what was begun in a directory and never committed, because its process was killed. Only to be
/// called where no other process writes.
///
/// # Errors
/// [`Error::Write`].
pub fn remove_unfinished(directory: &Path) -> Result<()> {
    let error = |reason| Error::Write { file: directory.display().to_string(), reason };
    for entry in fs::read_dir(directory).map_err(error)? {
        let entry = entry.map_err(error)?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let is_directory = entry.file_type().map_err(error)?.is_dir();
            let remove = if is_directory {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            remove.map_err(error)?;
        }
    }
    Ok(())
}

/// Removes a directory that was committed. Killed at any moment it leaves either the whole directory or
/// something that [`remove_unfinished`] removes.
///
/// # Errors
/// [`Error::Write`].
pub fn remove_directory(path: &Path) -> Result<()> {
    let error = |reason| Error::Write { file: path.display().to_string(), reason };
    let name =
        path.file_name().ok_or_else(|| error(io::Error::other("this is no directory's name")))?;
    let doomed = parent(path).join(format!("{PREFIX}{}", name.to_string_lossy()));
    fs::rename(path, &doomed).map_err(error)?;
    fs::remove_dir_all(&doomed).map_err(error)
}

/// Makes the names in a directory outlast a loss of power.
fn sync_directory(path: &Path) -> io::Result<()> {
    // Elsewhere a directory cannot be opened as a file.
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// An error of the temporary file, told without the temporary name.
fn plain(error: io::Error, path: &Path) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound if !parent(path).is_dir() => {
            io::Error::other(format!("there is no directory {}", parent(path).display()))
        }
        io::ErrorKind::Other => error,
        kind => kind.into(),
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_only_when_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, b"old").unwrap();
        let mut output = OutputFile::create(&path).unwrap();
        output.put(b"new").unwrap();
        drop(output);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let mut output = OutputFile::create(&path).unwrap();
        output.put(b"new").unwrap();
        output.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(entries(dir.path()), ["x"]);
    }

    #[test]
    fn what_is_not_a_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OutputFile::create(dir.path()).is_err());
        assert!(OutputFile::create(Path::new("/")).is_err());
        assert!(OutputFile::create(&dir.path().join("missing/x")).is_err());
        #[cfg(unix)]
        assert!(OutputFile::create(Path::new("/dev/null")).is_err());
        assert_eq!(entries(dir.path()), [""; 0]);
    }

    #[cfg(unix)]
    #[test]
    fn the_target_of_a_link_is_replaced_and_the_link_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("link"), dir.path().join("target"));
        fs::write(&target, b"old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let mut output = OutputFile::create(&link).unwrap();
        output.put(b"new").unwrap();
        output.commit().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"new");
    }

    #[test]
    fn a_directory_appears_whole_and_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let output = OutputDirectory::create(&path).unwrap();
        output.write_file("a", b"1").unwrap();
        assert!(output.write_file("missing/a", b"1").is_err());
        assert!(!path.exists());
        drop(output);
        assert_eq!(entries(dir.path()), [""; 0]);
        fs::create_dir(&path).unwrap();
        let output = OutputDirectory::create(&path).unwrap();
        output.write_file("a", b"1").unwrap();
        output.commit().unwrap();
        assert_eq!(entries(&path), ["a"]);
        assert!(OutputDirectory::create(&path).is_err());
        assert_eq!(entries(dir.path()), ["out"]);
    }

    #[test]
    fn what_a_killed_process_began_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("whole")).unwrap();
        std::mem::forget(OutputDirectory::create(&dir.path().join("begun")).unwrap());
        std::mem::forget(OutputFile::create(&dir.path().join("file")).unwrap());
        assert_eq!(entries(dir.path()).len(), 3);
        remove_unfinished(dir.path()).unwrap();
        assert_eq!(entries(dir.path()), ["whole"]);
        remove_directory(&dir.path().join("whole")).unwrap();
        assert_eq!(entries(dir.path()), [""; 0]);
    }
}
