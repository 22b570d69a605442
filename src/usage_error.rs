//! A wrong command line, said in one line with the nearest right word.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};

use crate::cli::Cli;
use crate::nearest::nearest;

/// Exit code for a command line that is not understood.
pub(crate) const EXIT_CODE: u8 = 2;

/// Describes `error` in one line. `words` is the command line that caused it.
pub(crate) fn describe(error: &clap::Error, words: &[String]) -> String {
    let root = Cli::command();
    let wrong = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    // What stands before the command does not belong to it.
    let before =
        words.iter().skip(1).take_while(|word| wrong.is_empty() || !word.starts_with(&wrong));
    let mut path = vec![&root];
    for word in before {
        path.extend(path.last().and_then(|command| command.find_subcommand(word)));
    }
    let problem = problem(error, &root, &path);
    format!("{problem} (see `{} --help`)", names(&path))
}

/// Whether the value of an option is not to be shown; it may have come from a variable.
fn is_secret(argument: &str, path: &[&Command]) -> bool {
    let name = argument.split(' ').next().and_then(|word| word.strip_prefix("--"));
    let mut known = path.iter().flat_map(|command| command.get_arguments());
    known.any(|known| known.is_hide_env_values_set() && known.get_long() == name)
}

fn problem(error: &clap::Error, root: &Command, path: &[&Command]) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(" and "),
        _ => String::new(),
    };
    let argument = context(ContextKind::InvalidArg);
    let value = context(ContextKind::InvalidValue);
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let command = path.last().copied().unwrap_or(root);
            unknown_command(&context(ContextKind::InvalidSubcommand), command)
        }
        ErrorKind::UnknownArgument => unknown_option(&argument, root, path),
        ErrorKind::InvalidValue if value.is_empty() => format!("{argument} needs a value"),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            match std::error::Error::source(error) {
                Some(reason) if is_secret(&argument, path) => {
                    format!("{argument} is wrong: {reason}")
                }
                Some(reason) if reason.to_string().contains(&value) => {
                    format!("{argument} is wrong: {reason}")
                }
                Some(reason) => format!("{argument}: {value:?} is wrong: {reason}"),
                None => format!("{argument}: {value:?} is wrong"),
            }
        }
        ErrorKind::MissingRequiredArgument => match error.get(ContextKind::InvalidArg) {
            Some(ContextValue::Strings(several)) if several.len() > 1 => {
                format!("{argument} are missing")
            }
            _ if error.get(ContextKind::PriorArg).is_some() => {
                format!("{} is of no use without {argument}", context(ContextKind::PriorArg))
            }
            _ => format!("{argument} is missing"),
        },
        ErrorKind::ArgumentConflict => {
            let other = context(ContextKind::PriorArg);
            if other.is_empty() || other == argument {
                format!("{argument} is given twice")
            } else {
                format!("{argument} and {other} exclude each other")
            }
        }
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

fn unknown_command(word: &str, command: &Command) -> String {
    let names: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
    match nearest(word, names.iter().copied()) {
        Some(name) => format!("there is no command {word:?}; did you mean {name:?}?"),
        None => format!("there is no command {word:?}; there are {}", names.join(", ")),
    }
}

fn unknown_option(argument: &str, root: &Command, path: &[&Command]) -> String {
    let word = argument.split('=').next().unwrap_or_default();
    let command = path.last().copied().unwrap_or(root);
    let own = options(command, root);
    let mut runnable = Vec::new();
    add_runnable(command, &names(path), &mut runnable);
    // Before a command, an option of that command is what was meant most likely.
    let below: Vec<(&str, Vec<String>)> =
        runnable.iter().map(|(name, command)| (name.as_str(), options(command, root))).collect();
    let all = || own.iter().chain(below.iter().flat_map(|(_, options)| options));
    let is_known = all().any(|option| option == word);
    let meant = if is_known { Some(word) } else { nearest(word, all().map(String::as_str)) };
    let owner = meant.filter(|option| !own.iter().any(|own| own == option)).and_then(|option| {
        let has = |(_, options): &&(&str, Vec<String>)| options.iter().any(|own| own == option);
        below.iter().find(has).map(|(name, _)| (option, *name))
    });
    match owner {
        Some((option, name)) if word.starts_with('-') => {
            let place = format!("after the command, as in `{name} {option} …`");
            if is_known {
                format!("{word} goes {place}")
            } else {
                format!("there is no option {word}; did you mean {option}? It goes {place}")
            }
        }
        _ => unknown_word(word, &own),
    }
}

/// The commands at and below `command` that do something, each with its whole name. The one that runs a
/// part comes before the one that prepares it.
fn add_runnable<'a>(command: &'a Command, name: &str, out: &mut Vec<(String, &'a Command)>) {
    if !command.is_subcommand_required_set() {
        out.push((name.to_owned(), command));
    }
    let mut below: Vec<_> = command.get_subcommands().collect();
    below.sort_by_key(|command| command.get_name() != "run");
    for command in below {
        add_runnable(command, &format!("{name} {}", command.get_name()), out);
    }
}

fn names(path: &[&Command]) -> String {
    path.iter().map(|command| command.get_name()).collect::<Vec<_>>().join(" ")
}

fn unknown_word(word: &str, options: &[String]) -> String {
    if !word.starts_with('-') {
        return format!("{word:?} is not expected here");
    }
    match nearest(word, options.iter().map(String::as_str)) {
        Some(option) => format!("there is no option {word}; did you mean {option}?"),
        None => format!("there is no option {word}"),
    }
}

/// The long options of a command, those of all commands included.
fn options(command: &Command, root: &Command) -> Vec<String> {
    let global = root.get_arguments().filter(|argument| argument.is_global_set());
    let names = command.get_arguments().chain(global).filter_map(clap::Arg::get_long);
    // These two are clap's own.
    let version = command.get_version().map(|_| "version");
    names.chain(["help"]).chain(version).map(|name| format!("--{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::CliError;

    fn line(words: &[&str]) -> String {
        let words: Vec<String> =
            ["mixsocks"].iter().chain(words).map(|word| (*word).to_owned()).collect();
        match Cli::from_words(words.iter().map(Into::into)).unwrap_err() {
            CliError::Words(error) => describe(&error, &words),
            CliError::Config(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_secret_that_is_wrong_is_not_shown() {
        for (words, expected) in [
            (["up", "--socks-user", "hunter2"], "USER:PASSWORD"),
            (["up", "--websocket-token", "hunter2"], "16 to 128"),
            (["receive", "--websocket-token", "hunter2"], "16 to 128"),
        ] {
            let line = line(&words);
            assert!(line.contains(words[1]) && line.contains(expected), "{line}");
            assert!(!line.contains("hunter2"), "{line}");
        }
    }

    #[test]
    fn options_of_a_websocket_need_one_wherever_they_stand() {
        for (option, value) in [
            ("--websocket-origin", "http://localhost:8000"),
            ("--websocket-host", "box.example"),
            ("--websocket-token", "0123456789abcdef"),
        ] {
            let expected = format!("{option} is of no use without --websocket (see `mixsocks up");
            let line = line(&["up", option, value]);
            assert!(line.starts_with(&expected) && !line.contains(value), "{line}");
            let words = ["mixsocks", "up", option, value, "--websocket", "127.0.0.1:0"];
            assert!(Cli::from_words(words.map(Into::into)).is_ok());
        }
        assert!(line(&["address", "--websocket-token", "0123456789abcdef"]).contains("of no use"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mixsocks.toml");
        let with_file = |text: &str| {
            std::fs::write(&file, format!("role = \"up\"\n{text}")).unwrap();
            let words = ["mixsocks", "up", "--config", file.to_str().unwrap()];
            Cli::from_words(words.map(Into::into))
        };
        let host = "websocket_host = \"box.example\"\n";
        match with_file(host) {
            Err(CliError::Words(error)) => {
                assert!(describe(&error, &[]).contains("--websocket-host is of no use"));
            }
            other => panic!("{other:?}"),
        }
        assert!(with_file(&format!("{host}websocket = \"127.0.0.1:0\"")).is_ok());
    }

    #[test]
    fn each_mistake_is_one_line_that_names_what_is_right() {
        for (words, expected) in [
            (&["up", "--sokcs", "127.0.0.1:1"][..], "did you mean --socks?"),
            (&["up", "--data"], "did you mean --data-dir?"),
            (&["up", "--quite"], "did you mean --quiet?"),
            (&["up", "--xyzzy=1"], "no option --xyzzy (see `mixsocks up --help`)"),
            (&["pu"], "did you mean \"up\"?"),
            (
                &["frobnicate"],
                "there are up, client, directory, node, provider, send, receive, address, providers,",
            ),
            (&["client", "rnu"], "did you mean \"run\"?"),
            (&["client", "--sokcs", "x"], "as in `mixsocks client run --socks …`"),
            (
                &["client", "init", "--sokcs", "x"],
                "did you mean --socks? (see `mixsocks client init",
            ),
            (&["config", "check"], "<FILE> is missing"),
            (&["--allow-private", "up"], "as in `mixsocks up --allow-private"),
            (&["--topology", "x", "client"], "as in `mixsocks client run --topology"),
            (&["--sokcs", "127.0.0.1:1", "up"], "did you mean --socks? It goes after the command"),
            (&["--secnods", "1", "bench"], "as in `mixsocks bench --seconds"),
            (&["--verson"], "did you mean --version?"),
            (&["--xyzzy", "up"], "no option --xyzzy (see `mixsocks --help`)"),
            (&["up", "--version"], "no option --version"),
            (&["up", "stray"], "\"stray\" is not expected here"),
            (&["up", "--socks", "1080"], "such as 127.0.0.1:1080"),
            (&["up", "--socks"], "--socks <ADDR:PORT> needs a value"),
            (&["up", "--mean-delay", "15"], "such as 15ms"),
            (&["up", "--mean-delay", "11s"], "longer than 10s"),
            (&["up", "--profile", "private"], "only the profile \"fast\""),
            (&["client", "run", "--mean-delay", "1ms"], "there is no option --mean-delay"),
            (&["client", "run", "--provider", "a@b"], "<identity>.<encryption>@<gateway identity>"),
            (&["up", "-v", "-q"], "--quiet and --verbose exclude each other"),
            (&["bench", "--socks", "[::1]:1", "--mean-delay", "0"], "exclude each other"),
            (&["bench", "--seconds", "0"], "1..=600"),
        ] {
            let line = line(words);
            assert!(line.contains(expected), "{words:?}: {line}");
            assert!(!line.contains('\n') && line.contains("--help"), "{words:?}: {line}");
        }
    }
}
