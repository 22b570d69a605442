//! Settings from a file: TOML whose keys are the long options of a command, with `_` for `-`.
//!
//! A value of the file becomes the default of its option, so that it is read, checked and explained like
//! one of the command line, and options and variables win over it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use toml::de::{DeTable, DeValue};

use crate::data_dir::{self, DataDir};
use crate::nearest::nearest;

/// Name of the file in a data directory.
pub(crate) const FILE: &str = "config.toml";

/// Key that says which command the file is for.
const ROLE: &str = "role";

/// A longer file holds something else.
const MAX_BYTES: u64 = 1024 * 1024;

/// Options that cannot stand in a file: how much is said, and where the file is.
const NOT_IN_FILE: [&str; 5] = ["verbose", "quiet", "config", "help", "version"];

/// A file whose every key and value has been checked.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    values: Vec<(String, Vec<String>)>,
}

/// One `key = value` of a file.
struct Entry {
    key: String,
    line: usize,
    values: Vec<String>,
}

impl ConfigFile {
    /// Reads the file at `path` for the command of this name, whose options `command` has.
    pub(crate) fn read(path: &Path, role: &str, command: &Command) -> Result<Self> {
        let (file, text) = read(path)?;
        let is_secret = |argument: &Arg| argument.is_hide_env_values_set();
        let mut values = Vec::new();
        let place = |line: usize| format!("{}, line {line}", path.display());
        let (found, entries) = entries(&text)
            .map_err(|(at, problem)| anyhow!("{}: {problem}", place(line_of(&text, at))))?;
        match found {
            Some(found) if found == role => {}
            Some(found) => bail!(
                "{} is for {found:?}, not for {role:?}; give another one with --config",
                path.display()
            ),
            None => bail!("{}: it lacks the line `{ROLE} = {role:?}`", path.display()),
        }
        for Entry { key, line, values: texts } in entries {
            let argument = settings(command).find(|argument| key_of(argument) == key);
            let Some(argument) = argument else {
                let keys: Vec<_> = settings(command).map(key_of).collect();
                let meant = match nearest(&key, keys.iter().map(String::as_str)) {
                    Some(near) => format!("; did you mean {near}?"),
                    None => format!("; there are {}", keys.join(", ")),
                };
                bail!("{}: there is no key {key}{meant}", place(line));
            };
            if is_secret(argument) {
                data_dir::refuse_readable_by_others(&file, path)?;
            }
            if texts.len() != 1 && !matches!(argument.get_action(), ArgAction::Append) {
                bail!("{}: {key} takes one value, not a list", place(line));
            }
            for text in &texts {
                if let Err(problem) = check(argument, text) {
                    let shown =
                        if is_secret(argument) { String::new() } else { format!(" {text:?}") };
                    bail!("{}: {key}:{shown} is wrong: {problem}", place(line));
                }
            }
            values.push((argument.get_id().to_string(), texts));
        }
        Ok(Self { values })
    }

    /// The command with the file's values as defaults of those options that it has.
    pub(crate) fn apply(&self, command: Command) -> Command {
        let ids: Vec<_> =
            command.get_arguments().map(|argument| argument.get_id().clone()).collect();
        let known = self.values.iter().filter(|(id, _)| ids.iter().any(|own| own == id.as_str()));
        known.fold(command, |command, (id, values)| {
            command.mut_arg(id, |argument| {
                let hidden = argument.get_action().takes_values();
                argument.required(false).default_values(values).hide_default_value(hidden)
            })
        })
    }
}

/// Which command the file at `path` is for.
pub(crate) fn role_of(path: &Path) -> Result<String> {
    let (_, text) = read(path)?;
    let path = path.display();
    match entries(&text) {
        Ok((Some(role), _)) => Ok(role),
        Ok((None, _)) => bail!("{path} lacks a line such as `{ROLE} = \"client\"`"),
        Err((at, problem)) => bail!("{path}, line {}: {problem}", line_of(&text, at)),
    }
}

fn read(path: &Path) -> Result<(File, String)> {
    let explain = |error| anyhow!("cannot read the configuration {}: {error}", path.display());
    let file = File::open(path).map_err(explain)?;
    let mut text = String::new();
    (&file).take(MAX_BYTES + 1).read_to_string(&mut text).map_err(explain)?;
    if text.len() as u64 > MAX_BYTES {
        bail!("{} is no configuration: it has more than 1 MiB", path.display());
    }
    Ok((file, text))
}

type Entries = (Option<String>, Vec<Entry>);

/// The role and all else in a file; an error says at which byte.
fn entries(text: &str) -> Result<Entries, (usize, String)> {
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |Range { start, .. }| start);
        (at, error.message().lines().collect::<Vec<_>>().join(" "))
    })?;
    let mut role = None;
    let mut entries = Vec::new();
    for (key, value) in table.into_inner() {
        let at = key.span().start;
        let key = key.into_inner().into_owned();
        let values = texts(value.get_ref()).ok_or_else(|| {
            (at, format!("{key} must be a text, a number, true or false, or a list of them"))
        })?;
        if key != ROLE {
            entries.push(Entry { key, line: line_of(text, at), values });
        } else if let [one] = &values[..] {
            role = Some(one.clone());
        } else {
            return Err((at, format!("{ROLE} takes one value, not a list")));
        }
    }
    entries.sort_by_key(|entry| entry.line);
    Ok((role, entries))
}

/// A value, or the elements of a list, as a command line has them.
fn texts(value: &DeValue<'_>) -> Option<Vec<String>> {
    if let DeValue::Array(elements) = value {
        let elements = elements.iter().map(|element| scalar(element.get_ref()));
        return elements.collect();
    }
    scalar(value).map(|text| vec![text])
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

/// What is wrong with a value, as its option says it.
fn check(argument: &Arg, text: &str) -> Result<(), String> {
    let alone = argument.clone().required(false).default_value(text.to_owned());
    let command = Command::new("check").no_binary_name(true).arg(alone);
    match command.try_get_matches_from::<_, &str>([]) {
        Ok(_) => Ok(()),
        Err(error) => Err(match std::error::Error::source(&error) {
            Some(reason) => reason.to_string(),
            None => error.to_string().lines().next().unwrap_or_default().replace("error: ", ""),
        }),
    }
}

/// The options of a command that may stand in its file.
fn settings(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|argument| {
        argument.get_long().is_some() && !NOT_IN_FILE.contains(&argument.get_id().as_str())
    })
}

fn key_of(argument: &Arg) -> String {
    argument.get_id().to_string()
}

/// Writes the file of a command: each key with what it means; those that the command line or a variable
/// gave a value have it, the others are commented out with their default.
pub(crate) fn template(role: &str, command: &Command, matches: &ArgMatches) -> String {
    let mut out = format!(
        "# Settings of `mixsocks {role} run`. Each is also an option (--data-dir for data_dir) and a\n\
         # variable (MIXSOCKS_DATA_DIR): an option wins over a variable, a variable over this file.\n\
         # `mixsocks config check FILE` says what is wrong with it.\n\
         \n\
         {ROLE} = {}\n",
        quoted(role)
    );
    for argument in settings(command).filter(|argument| !argument.is_hide_set()) {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        out.push('\n');
        for line in wrapped(&help) {
            out.push_str(&format!("# {line}\n"));
        }
        let key = key_of(argument);
        let given = matches!(
            matches.value_source(&key),
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        );
        let raw: Vec<String> = match matches.get_raw(&key).filter(|_| given) {
            Some(values) => values.map(|value| value.to_string_lossy().into_owned()).collect(),
            None => defaults(argument),
        };
        let mark = if given { "" } else { "#" };
        let values: Vec<_> = raw.iter().map(|value| literal(value)).collect();
        let value = match &values[..] {
            [one] if !matches!(argument.get_action(), ArgAction::Append) => one.clone(),
            several => format!("[{}]", several.join(", ")),
        };
        out.push_str(&format!("{mark}{key} = {value}\n"));
    }
    out
}

/// The default of an option, or else what stands for its value in the help.
fn defaults(argument: &Arg) -> Vec<String> {
    if matches!(argument.get_action(), ArgAction::SetTrue) {
        return vec!["false".to_owned()];
    }
    let defaults = argument.get_default_values();
    if defaults.is_empty() {
        let names = argument.get_value_names().into_iter().flatten();
        return names.map(ToString::to_string).take(1).collect();
    }
    defaults.iter().map(|value| value.to_string_lossy().into_owned()).collect()
}

/// A value as TOML has it.
fn literal(value: &str) -> String {
    let is_bare = value.parse::<u32>().is_ok() || value.parse::<bool>().is_ok();
    if is_bare { value.to_owned() } else { quoted(value) }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Words in lines of at most 100 characters.
fn wrapped(text: &str) -> Vec<String> {
    const WIDTH: usize = 100;
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is a first line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= WIDTH {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// Writes a file that is not there yet: the one that was named, or else the one in the data directory.
pub(crate) fn write(dir: &DataDir, named: Option<&Path>, text: &str) -> Result<PathBuf> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => dir.path().join(FILE),
    };
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // It may get a secret.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    match written {
        Ok(()) => Ok(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("{} is there already: edit it, or delete it first", path.display())
        }
        Err(error) => Err(data_dir::explain(&error, &path)),
    }
}

/// Where the file of a command is: the one that was named, or else the one in the data directory, if
/// it is there.
pub(crate) fn path(matches: &ArgMatches, role: &str) -> Option<PathBuf> {
    let given = |id| matches.try_get_one::<PathBuf>(id).ok().flatten().cloned();
    if let Some(path) = given("config") {
        return Some(path);
    }
    // Without a home directory there is no file either; the data directory is asked for later.
    let data_dir = given("data_dir").or_else(|| DataDir::default_path(role).ok())?;
    let path = data_dir.join(FILE);
    path.exists().then_some(path)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::Args;

    use super::*;
    use crate::cli::{Cli, CliError, ClientArgs, Command as CliCommand, check_config};

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn parse(words: &[&str], file: &Path) -> Result<Cli, String> {
        let words = words.iter().map(OsString::from);
        let config = ["--config".into(), file.as_os_str().to_owned()];
        Cli::from_words(words.chain(config)).map_err(|error| match error {
            CliError::Words(error) => error.to_string(),
            CliError::Config(error) => format!("{error:#}"),
        })
    }

    fn client(words: &[&str], text: &str) -> ClientArgs {
        let file = file(text);
        let words: Vec<_> = ["mixsocks", "client", "run"].iter().chain(words).copied().collect();
        match parse(&words, file.path()).unwrap().command {
            CliCommand::Client(crate::cli::ClientCommand::Run(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_option_wins_over_the_file_and_the_file_over_the_default() {
        let text = "role = \"client\"\nsocks = \"[::1]:9050\"\ndata_dir = \"/x\"\n";
        let args = client(&[], text);
        assert_eq!(args.listen.socks.to_string(), "[::1]:9050");
        assert_eq!(args.run.data_dir.as_deref(), Some(Path::new("/x")));
        assert_eq!(client(&["--socks", "[::1]:1"], text).listen.socks.port(), 1);
        assert_eq!(client(&[], "role = 'client'").listen.socks.to_string(), "127.0.0.1:1080");
    }

    #[test]
    fn a_flag_may_stand_in_the_file() {
        let file = file("role = \"up\"\nallow_private = true\nmean_delay = \"0\"\n");
        match parse(&["mixsocks", "up"], file.path()).unwrap().command {
            CliCommand::Up(args) => {
                assert!(args.exit.allow_private);
                assert_eq!(args.traffic.mean_delay, Some(std::time::Duration::ZERO));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_list_gives_several_values_and_an_option_replaces_them() {
        let text = "role = \"client\"\nprovider = [\"one\", \"two\"]\nsignatures = 2\n";
        let args = client(&[], text);
        assert_eq!((args.provider.len(), args.network.signatures), (2, Some(2)));
        assert_eq!(client(&["--provider", "three"], text).provider.len(), 1);
    }

    #[test]
    fn each_mistake_names_the_line_and_what_is_right() {
        for (text, expected) in [
            (
                "role = \"client\"\nsokcs = \"[::1]:1\"",
                "line 2: there is no key sokcs; did you mean socks?",
            ),
            (
                "role = \"client\"\n\nxyzzy = 1",
                "line 3: there is no key xyzzy; there are directory, topology,",
            ),
            ("role = \"client\"\nquiet = true", "there is no key quiet"),
            ("role = \"client\"\nsocks = 1080", "line 2: socks: \"1080\" is wrong: expected an IP"),
            (
                "role = \"client\"\nsocks = [\"[::1]:1\", \"[::1]:2\"]",
                "takes one value, not a list",
            ),
            ("role = \"client\"\nsocks = []", "takes one value, not a list"),
            ("role = \"client\"\nsocks = {a = 1}", "line 2: socks must be a text, a number"),
            ("role = \"client\"\nsocks = 1979-05-27", "line 2: socks must be a text, a number"),
            (
                "role = \"client\"\nsocks = \"[::1]:1\"\nsocks = \"[::1]:1\"",
                "line 3: duplicate key",
            ),
            ("role = \"client\"\nsocks", "line 2: "),
            ("role = \"up\"", "is for \"up\", not for \"client\""),
            ("role = [\"client\", \"up\"]\n", "line 1: role takes one value"),
            ("socks = \"[::1]:1\"", "lacks the line `role = \"client\"`"),
        ] {
            let file = file(text);
            let error = parse(&["mixsocks", "client", "run"], file.path()).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
        let none = parse(&["mixsocks", "client", "run"], Path::new("/nowhere/x.toml")).unwrap_err();
        assert!(none.contains("cannot read the configuration /nowhere/x.toml"), "{none}");
        let long = file(&format!("role = \"client\"\n{}", "# long\n".repeat(200_000)));
        let error = parse(&["mixsocks", "client", "run"], long.path()).unwrap_err();
        assert!(error.contains("more than 1 MiB"), "{error}");
    }

    /// What has no wrong text: paths, and a provider's name.
    const TAKES_ANY_TEXT: [&str; 6] =
        ["topology", "data_dir", "invitation", "access_token_file", "provider", "impairment"];

    /// Each key of each role's file, wrong in each way.
    #[test]
    fn each_key_may_be_wrong_in_each_way() {
        let mut keys = 0;
        for role in ["up", "client", "directory", "node", "provider"] {
            let command = crate::cli::options_of(role).unwrap();
            for argument in settings(&command) {
                keys += 1;
                let key = key_of(argument);
                let text = |entry: &str| format!("role = \"{role}\"\n{entry}\n");
                let check = |entry: String| {
                    let file = file(&text(&entry));
                    let result = check_config(file.path()).map_err(|error| format!("{error:#}"));
                    if let Err(line) = &result {
                        assert!(
                            !line.contains('\n') && line.contains("line 2: "),
                            "{entry}: {line}"
                        );
                    }
                    result
                };
                let type_error = check(format!("{key} = {{a = 1}}")).unwrap_err();
                assert!(type_error.contains(&format!("{key} must be a text")), "{type_error}");
                let twice = format!("{}{}", key, key.chars().last().unwrap());
                let unknown = check(format!("{twice} = 1")).unwrap_err();
                let expected = format!("no key {twice}; did you mean {key}?");
                assert!(unknown.contains(&expected), "{unknown}");
                let wrong = check(format!("{key} = \"\\u0001?\""));
                assert_eq!(wrong.is_ok(), TAKES_ANY_TEXT.contains(&&*key), "{key}: {wrong:?}");
            }
        }
        assert!(keys > 50, "{keys}");
    }

    #[test]
    fn values_out_of_their_range_are_refused() {
        for (role, entry, expected) in [
            ("directory", "epoch = \"0s\"", "between 1 second and 7 days"),
            ("directory", "epoch = \"8d\"", "between 1 second and 7 days"),
            ("directory", "epoch = \"1500ms\"", "whole seconds"),
            ("directory", "key_epochs = 0", "1.."),
            ("directory", "valid_epochs = 1", "2..=1000"),
            ("directory", "payload_bytes = 1023", "1024..=32768"),
            ("directory", "mean_delay = \"11s\"", "longer than 10s"),
            ("directory", "minimum = \"mix=x\"", "no number"),
            ("directory", "minimum = \"mixes=3\"", "mix, gateway or provider"),
            ("directory", "peer = \"http://127.0.0.1:1\"", "KEY@URL"),
            ("directory", "allow = \"abc=mix\"", "the key"),
            ("directory", "network = \"UPPER\"", "a-z, 0-9 and hyphen"),
            ("node", "kind = \"provider\"", "mix or gateway"),
            ("node", "directory = \"https://a\"", "documents are signed"),
            ("node", "listen = 9001", "an IP address and a port"),
            ("provider", "name = \"\"", "a-z, 0-9 and hyphen"),
            ("client", "signatures = -1", "invalid digit"),
        ] {
            let file = file(&format!("role = \"{role}\"\n{entry}\n"));
            let error = format!("{:#}", check_config(file.path()).unwrap_err());
            assert!(error.contains(expected), "{entry}: {error}");
        }
    }

    #[test]
    fn a_wrong_secret_is_not_shown() {
        let file = file("role = \"client\"\nsocks_user = \"hunter2\"");
        let error = parse(&["mixsocks", "client", "run"], file.path()).unwrap_err();
        assert!(error.contains("expected USER:PASSWORD") && !error.contains("hunter2"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_with_a_secret_is_for_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt;
        let file = file("role = \"client\"\nsocks_user = \"a:b\"");
        let read = || parse(&["mixsocks", "client", "run"], file.path());
        read().unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = read().unwrap_err();
        assert!(error.contains("chmod 600"), "{error}");
    }

    /// What `init` writes is right as it is, and as it is when every line is in force.
    #[test]
    fn a_template_can_be_read() {
        let command = ClientArgs::augment_args(Command::new("client"));
        let words = ["client", "--socks", "[::1]:9050", "--topology", "/a \"b\""];
        let matches = command.clone().try_get_matches_from(words).unwrap();
        let text = template("client", &command, &matches);
        let given = file(&text);
        check_config(given.path()).unwrap();
        let args = client(&[], &text);
        assert_eq!(args.listen.socks.to_string(), "[::1]:9050");
        assert_eq!(args.network.topology.as_deref(), Some(Path::new("/a \"b\"")));
        for argument in settings(&command) {
            let key = key_of(argument);
            let lines = text
                .lines()
                .filter(|line| line.trim_start_matches('#').starts_with(&format!("{key} = ")));
            assert_eq!(lines.count(), 1, "{key}");
            assert!(argument.get_env().is_some(), "{key} has no variable");
        }
    }

    #[test]
    fn a_file_that_is_there_is_not_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let dir = DataDir::open(folder.path()).unwrap();
        let path = write(&dir, None, "one").unwrap();
        let error = write(&dir, None, "two").unwrap_err().to_string();
        assert!(error.contains("is there already"), "{error}");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "one");
    }
}
