//! Keeps a panic that is caught and turned into an error from being printed.

use std::cell::Cell;
use std::sync::Once;

thread_local! {
    static IS_SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `call`; a panic inside, which `call` must catch itself, prints nothing.
///
/// The first call wraps the program's panic hook, which goes on to see every other panic.
pub(super) fn silence<T>(call: impl FnOnce() -> T) -> T {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !IS_SILENT.get() {
                hook(info);
            }
        }));
    });
    let before = IS_SILENT.replace(true);
    let result = call();
    IS_SILENT.set(before);
    result
}
