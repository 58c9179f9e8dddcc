//! Every command shows how it is typed, and what it shows can be typed. A slim build has fewer commands than its examples
//! name, so this is for the whole one.

use clap::{CommandFactory as _, Parser as _};

use super::Cli;

/// Every command that does something, by its words.
fn leaves(command: &clap::Command, words: &str, found: &mut Vec<(String, String)>) {
    let mut nested = false;
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        nested = true;
        leaves(sub, &format!("{words} {}", sub.get_name()), found);
    }
    let help = command.get_after_help().map(|help| help.to_string()).unwrap_or_default();
    // A command whose parts have examples needs none of its own, but those that it has must be right.
    if !nested || help.contains("Examples:\n") {
        found.push((words.to_owned(), help));
    }
}

/// The lines under `Examples:`, up to the next line that is not indented.
fn examples(help: &str) -> Vec<String> {
    let after = help.split_once("Examples:\n").map(|(_, after)| after).unwrap_or_default();
    after.lines().take_while(|line| line.starts_with("  ")).map(|line| line.trim().to_owned()).collect()
}

/// What a shell would start, one list of words a command.
fn shell(line: &str) -> Vec<Vec<String>> {
    let (mut commands, mut word, mut quote) = (vec![Vec::new()], None::<String>, None);
    let end = |word: &mut Option<String>, commands: &mut Vec<Vec<String>>| {
        if let (Some(word), Some(command)) = (word.take(), commands.last_mut()) {
            command.push(word);
        }
    };
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => end(&mut word, &mut commands),
            (None, '|') => {
                end(&mut word, &mut commands);
                commands.push(Vec::new());
            }
            _ => word.get_or_insert_default().push(c),
        }
    }
    end(&mut word, &mut commands);
    commands
}

/// Our own commands in what a shell would start: without settings in front, and without redirections behind.
fn ours(line: &str) -> Vec<Vec<String>> {
    let ours = |command: Vec<String>| {
        let from = command.iter().position(|w| w == "voxfleet")?;
        let (before, command) = command.split_at(from);
        let to = command.iter().position(|w| w == ">" || w == "<").unwrap_or(command.len());
        before.iter().all(|w| w.starts_with("VOXFLEET__")).then(|| command[..to].to_vec())
    };
    shell(line).into_iter().filter_map(ours).collect()
}

#[test]
fn a_line_is_read_like_a_shell_does() {
    let line = "A=1 x 'a b' | VOXFLEET__A__B=c voxfleet y -f \"c | d\" > file";
    assert_eq!(ours(line), [["voxfleet", "y", "-f", "c | d"]]);
}

#[test]
fn every_command_has_examples_and_all_of_them_can_be_typed() {
    let mut found = Vec::new();
    leaves(&Cli::command(), "voxfleet", &mut found);
    for (words, help) in &found {
        // The list of benches stands for all of them.
        let covered = words.starts_with("voxfleet bench ");
        let lines: Vec<String> = examples(help);
        let own = lines.iter().flat_map(|l| ours(l)).filter(|c| c.join(" ").starts_with(words)).count();
        // `decode` shows `nats` calling it.
        assert!(covered || own > 0, "{words} has no example of itself");
        for command in lines.iter().flat_map(|l| ours(l)) {
            if let Err(error) = Cli::try_parse_from(&command) {
                panic!("{command:?}: {error}");
            }
        }
    }
    assert!(found.len() > 15, "{found:?}");
}
