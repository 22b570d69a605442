//! `mixsocks directory`: an authority of a network.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use mixsocks_common::directory::{
    AddressRule, Admission, Invitation, InvitationHash, Rules, Settings,
};
use mixsocks_common::keys::{Identity, IdentityKey};
use mixsocks_common::topology::{Authorities, Epochs, Parameters};
use mixsocks_directory::{DirectoryConfig, DirectoryServer, Peer, Store};

use crate::cli::{
    Allowed, Cli, Command, DirectoryArgs, DirectoryCommand, DirectoryInitArgs, InviteArgs,
    MAX_DELAY, kind_word,
};
use crate::config;
use crate::data_dir::DataDir;
use crate::invitations::{self, Invitations};
use crate::open_files;
use crate::service::{self, Service};
use crate::signals::{Signals, Wish};

/// The role, as files and folders name it.
const ROLE: &str = "directory";
/// Its key.
const KEY: &str = "authority.key";
/// Its public key, for members and clients.
const PUBLIC_KEY: &str = "authority.pub";
/// Names the key until it has kept a record for the first time: from then on a missing one is a lost
/// one.
const NEW: &str = "new";
const RECORD: &str = "record";

/// The longest overlap that is chosen unasked, in seconds.
const USUAL_OVERLAP: u64 = 15 * 60;

/// Does what the command says.
pub(crate) async fn run(command: DirectoryCommand, config: &str, quiet: bool) -> Result<()> {
    match command {
        DirectoryCommand::Init(args) => init(&args, config),
        DirectoryCommand::Invite(args) => invite(&args),
        DirectoryCommand::Run(args) => serve(args, quiet).await,
    }
}

/// Writes the configuration file, the key, and invitations.
fn init(args: &DirectoryInitArgs, config: &str) -> Result<()> {
    let DirectoryInitArgs { directory, invite } = args;
    let dir = DataDir::open_for(ROLE, directory.run.data_dir.as_deref())?;
    let key = key(&dir)?;
    rules(directory, &key)?;
    dir.write(PUBLIC_KEY, format!("{}\n", key.identity()).as_bytes())?;
    let config = match invite {
        // As many as were invited make the first document.
        Some(invite) => config.replacen(
            &format!("#minimum = \"{}\"", directory.minimum),
            &format!("minimum = \"{}\"", invite.enough()),
            1,
        ),
        None => config.to_owned(),
    };
    let file = config::write(&dir, directory.file.config.as_deref(), &config)?;
    let invitations = Invitations::new(dir.path());
    let mut made = Vec::new();
    for (kind, count) in invite.unwrap_or_default().counts() {
        for number in 1..=count {
            let name = format!("{}-{number}", kind_word(kind));
            let invitation = Invitation::generate(&mut rand::rng());
            invitations.add(&invitation.hash(&key.identity()), kind)?;
            made.push(invitations.write_secret(&dir, &name, &invitation)?);
        }
    }
    let file = file.display();
    let mut text = format!("settings   {file}\nauthority  {}\n", key.identity());
    for path in made {
        text.push_str(&format!("invitation {}\n", path.display()));
    }
    text.push_str(&format!(
        "\nLook through the settings, and start it with: mixsocks directory run --config {file}"
    ));
    crate::say(&text);
    Ok(())
}

/// Makes an invitation, also while the authority runs.
fn invite(args: &InviteArgs) -> Result<()> {
    let path = match &args.data_dir {
        Some(path) => path.clone(),
        None => DataDir::default_path(ROLE)?,
    };
    let identity = DataDir::read_identity(&path.join(KEY)).with_context(|| {
        "there is no authority; make one with `mixsocks directory init`".to_owned()
    })?;
    let invitation = match &args.invitation {
        Some(file) => invitations::read_secret(file)?,
        None => Invitation::generate(&mut rand::rng()),
    };
    Invitations::new(&path).add(&invitation.hash(&identity), args.kind)?;
    if args.invitation.is_none() {
        crate::say(&invitations::to_text(&invitation));
    }
    Ok(())
}

/// Runs until Ctrl-C or SIGTERM.
async fn serve(args: DirectoryArgs, quiet: bool) -> Result<()> {
    open_files::raise_limit();
    let mut signals = Signals::new()?;
    let service = Service::start(ROLE, args.run.metrics).await?;
    let dir = Arc::new(DataDir::open_for(ROLE, args.run.data_dir.as_deref())?);
    dir.require_space()?;
    let key = key(&dir)?;
    let identity = key.identity();
    let rules = rules(&args, &key)?;
    let listener = service::bind(args.listen, "--listen").await?;
    let is_new = dir.read_text(NEW)?.is_some_and(|of| of == identity.to_string());
    let allowed = Arc::new(Mutex::new(args.allow.clone()));
    let (list, folder) = (allowed.clone(), dir.path().to_owned());
    let invited = Invitations::new(dir.path());
    let mut server = DirectoryServer::start(DirectoryConfig {
        key,
        rules,
        peers: peers(&args),
        listener,
        store: Arc::new(DirectoryStore(dir)),
        has_run: !is_new,
        admission: Box::new(move || admission(&list, &folder)),
        invited: Box::new(move |hash: InvitationHash, who| invited.take(&hash, who)),
    })
    .context("the authority does not start")?;
    let address = server.address();
    service.watch(metrics(&server));
    service.ready();
    if quiet {
        crate::say(&format!("directory  http://{address}"));
    } else {
        crate::say(&greeting(&args, address, identity));
    }
    loop {
        tokio::select! {
            wish = signals.wish() => match wish {
                Wish::Stop => break,
                Wish::Reload => {}
            },
            () = server.ended() => bail!("a part of the authority has failed; see the log"),
        }
        match reread() {
            Ok(newest) => {
                *allowed.lock().unwrap_or_else(PoisonError::into_inner) = newest.allow;
                server.reload().await;
                tracing::info!("the list of members and the invitations were read again");
            }
            Err(error) => tracing::warn!("the settings are not read again: {error:#}"),
        }
    }
    service.stopping();
    server.shutdown().await;
    Ok(())
}

/// The options as they would be if the authority were started now.
fn reread() -> Result<DirectoryArgs> {
    match Cli::from_words(std::env::args_os()) {
        Ok(Cli { command: Command::Directory(DirectoryCommand::Run(args)), .. }) => Ok(args),
        Ok(_) => bail!("they are those of another command"),
        Err(error) => Err(error.into()),
    }
}

fn greeting(args: &DirectoryArgs, address: SocketAddr, identity: Identity) -> String {
    let network = args.network.as_str();
    let members = format!("--directory http://{address} --authority {identity}");
    format!(
        "An authority of the network {network:?} runs.\n\
         \n\
         authority  {identity}\n\
         directory  http://{address}\n\
         \n\
         Members and clients: mixsocks … run {members}\n\
         Ctrl-C stops."
    )
}

/// The key; a new one is marked as such, by name: one that was put back from a backup may have signed.
fn key(dir: &DataDir) -> Result<IdentityKey> {
    let is_new = !dir.has(KEY);
    let key = dir.identity_key(KEY)?;
    if is_new {
        dir.write(NEW, key.identity().to_string().as_bytes())?;
    }
    Ok(key)
}

fn peers(args: &DirectoryArgs) -> Vec<Peer> {
    let peer =
        |peer: &crate::cli::PeerChoice| Peer { identity: peer.identity, url: peer.url.clone() };
    args.peer.iter().map(peer).collect()
}

/// What the options say about the network.
fn rules(args: &DirectoryArgs, key: &IdentityKey) -> Result<Rules> {
    let me = key.identity();
    if args.peer.iter().any(|peer| peer.identity == me) {
        bail!("--peer names this authority itself, {me}; give the other ones only");
    }
    let keys: Vec<_> = std::iter::once(me).chain(args.peer.iter().map(|p| p.identity)).collect();
    let threshold = args.signatures.unwrap_or(keys.len() / 2 + 1);
    let epoch_seconds = args.epoch.as_secs();
    let key_seconds = epoch_seconds.saturating_mul(args.key_epochs);
    let overlap_seconds = match args.overlap {
        Some(overlap) => overlap.as_secs(),
        None => USUAL_OVERLAP.min(key_seconds / 4),
    };
    let settings = Settings {
        network: args.network.clone(),
        parameters: Parameters {
            payload_bytes: args.payload_bytes as usize,
            mean_delay: args.mean_delay,
            max_delay: MAX_DELAY,
            epochs: Epochs { epoch_seconds, key_epochs: args.key_epochs, overlap_seconds },
        },
        authorities: Authorities::new(keys, threshold)?,
        addresses: match args.private_addresses {
            true => AddressRule::Private,
            false => AddressRule::Public,
        },
        valid_epochs: args.valid_epochs,
        minimum: args.minimum.into(),
    };
    Ok(Rules::new(settings)?)
}

/// Whom the list and the files of invitations admit.
fn admission(allowed: &Mutex<Vec<Allowed>>, folder: &Path) -> io::Result<Admission> {
    let allowed = allowed.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut admission = Admission::new(allowed.into_iter().map(|a| (a.identity, a.kind)));
    for (hash, kind, taken_by) in Invitations::new(folder).all()? {
        admission.invite(hash, kind, taken_by).map_err(io::Error::other)?;
    }
    Ok(admission)
}

/// The data directory, in which a first record ends the state of being new.
struct DirectoryStore(Arc<DataDir>);

impl Store for DirectoryStore {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Store::read(&*self.0, name)
    }

    fn write(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        Store::write(&*self.0, name, contents)?;
        if name == RECORD && self.0.has(NEW) {
            std::fs::remove_file(self.0.path().join(NEW))?;
        }
        Ok(())
    }
}

/// What the authority has to tell.
fn metrics(server: &DirectoryServer) -> impl service::Source + use<> {
    let asker = server.asker();
    move || {
        let asker = asker.clone();
        async move {
            let Some(status) = asker.status().await else {
                return service::Report::sick("the authority has stopped");
            };
            let in_force = status.in_force;
            let mut report = match in_force {
                Some(_) => service::Report::healthy(),
                None => service::Report::sick("no document is in force"),
            };
            report.gauge("epoch", "Epoch by the clock.", status.epoch);
            let (epoch, until) = in_force.map_or((0, 0), |(epoch, until)| (epoch, until.0));
            report.gauge("document_epoch", "Epoch of the document in force; 0 for none.", epoch);
            report.gauge("document_until_seconds", "Until when it is in force, since 1970.", until);
            let twice = status.signed_twice.len() as u64;
            report.gauge("signed_twice", "Authorities that signed two documents.", twice);
            report
        }
    }
}
