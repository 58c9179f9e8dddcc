//! ONNX Runtime: loaded when the engine starts, from a path it is given. A missing or foreign library, or a file that is no
//! model, is an error with its reason; what follows from it is the caller's decision.

use std::{
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Mutex, PoisonError},
};

use ort::{
    environment::Environment,
    session::{Session, builder::GraphOptimizationLevel},
};

/// A model to open.
#[derive(Clone, Copy)]
pub(super) enum Model<'a> {
    File(&'a Path),
    Bytes(&'a [u8]),
}

/// Opens a model, on one thread that does not spin: the cores belong to the decoder. Loads the library once per process; a
/// later path is not looked at.
pub(super) fn open(model: Model<'_>, library: &Path) -> Result<Session, String> {
    // ort panics where a library has the right name and the wrong inside.
    catch_unwind(AssertUnwindSafe(|| open_checked(model, library)))
        .unwrap_or_else(|_| Err(format!("{} is not usable", library.display())))
}

fn failed(what: &str) -> impl Fn(ort::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn open_checked(model: Model<'_>, library: &Path) -> Result<Session, String> {
    check_library(library)?;
    if let Model::File(file) = model
        && !file.is_file()
    {
        return Err(format!("{} is not there", file.display()));
    }
    let environment = environment(library)?;
    let setting = |e: ort::Error<ort::session::builder::SessionBuilder>| e.to_string();
    let mut builder = Session::builder(&environment)
        .map_err(failed("making a session"))?
        .with_intra_threads(1)
        .map_err(setting)?
        .with_inter_threads(1)
        .map_err(setting)?
        .with_intra_op_spinning(false)
        .map_err(setting)?
        .with_inter_op_spinning(false)
        .map_err(setting)?
        // It keeps one plan for each length of input that was ever seen, and hardly any two are alike.
        .with_memory_pattern(false)
        .map_err(setting)?
        .with_optimization_level(GraphOptimizationLevel::Level3)
        .map_err(setting)?;
    match model {
        Model::File(file) => builder.commit_from_file(file),
        Model::Bytes(bytes) => builder.commit_from_memory(bytes),
    }
    .map_err(failed("loading the model"))
}

/// ONNX Runtime's environment: one per process, of the first library that worked.
fn environment(library: &Path) -> Result<Environment, String> {
    static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);
    let mut known = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = known.as_ref() {
        return Ok(environment.clone());
    }
    let environment = ort::init_from(library)
        .map_err(|e| e.to_string())?
        .with_name("voxfleet")
        .with_telemetry(false)
        .build()
        .map_err(failed("starting ONNX Runtime"))?;
    Ok(known.insert(environment).clone())
}

/// What is no shared library at all is told apart before the dynamic linker sees it.
fn check_library(library: &Path) -> Result<(), String> {
    let unusable = |why: String| format!("{}: {why}", library.display());
    let mut magic = [0u8; 4];
    let mut file = std::fs::File::open(library).map_err(|e| unusable(e.to_string()))?;
    file.read_exact(&mut magic).map_err(|e| unusable(e.to_string()))?;
    if cfg!(target_os = "linux") && magic != *b"\x7fELF" {
        return Err(unusable("not a shared library".to_owned()));
    }
    Ok(())
}
